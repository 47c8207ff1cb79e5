// Draws the charts of the page, shows their tooltips and prepares printing. No network, no eval.
"use strict";
(() => {
  const tooltip = document.createElement("div");
  tooltip.className = "tooltip";
  tooltip.hidden = true;
  document.body.append(tooltip);

  // Only textContent: whatever a prompt says stays text.
  function showTooltip(_handler, event, _item, value) {
    if (value === null || value === undefined || value === "") {
      tooltip.hidden = true;
      return;
    }
    tooltip.replaceChildren(
      ...Object.entries(value).map(([name, text]) => {
        const line = document.createElement("p");
        const label = document.createElement("span");
        const content = document.createElement("bdi");
        label.textContent = name;
        content.textContent = text;
        line.append(label, content);
        return line;
      }),
    );
    tooltip.hidden = false;
    const { width, height } = tooltip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - width - 8);
    const below = event.clientY + 16;
    const fits = below + height < window.innerHeight;
    tooltip.style.left = `${Math.max(8, left)}px`;
    tooltip.style.top = `${Math.max(8, fits ? below : event.clientY - height - 12)}px`;
  }

  const views = new Map();
  const options = {
    mode: "vega-lite",
    renderer: "svg",
    ast: true, // expressions are interpreted, so that the policy can forbid eval
    actions: false,
    defaultStyle: false,
    tooltip: showTooltip,
  };
  const drawn = [...document.querySelectorAll("[data-chart]")].map(async (element) => {
    const spec = JSON.parse(document.getElementById(`spec-${element.dataset.chart}`).textContent);
    const { view } = await window.vegaEmbed(element, spec, options);
    views.set(element.dataset.chart, view);
  });
  Promise.all(drawn).then(() => {
    document.documentElement.dataset.drawn = "true";
  });

  for (const group of document.querySelectorAll("fieldset[data-charts]")) {
    group.addEventListener("change", () => {
      const shown = [...group.querySelectorAll("input:checked")].map((input) => input.value);
      for (const name of group.dataset.charts.split(" ")) {
        views.get(name)?.signal("shown", shown).runAsync();
      }
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tooltip.hidden = true;
  });

  // Paper cannot unfold: open what is folded, except what is hidden on purpose and long prompts.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(.sensitive):not(.prompt)")];
    for (const element of opened) element.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const element of opened) element.open = false;
  });
})();
