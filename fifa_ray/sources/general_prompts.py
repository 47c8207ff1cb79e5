"""`evaluate.prompts=general`: a small list of general-purpose prompts, by category.

Written for this project and under its licence. Plain and awkward ones, none that asks for a living
person, a brand or anyone's style. Too few to rank models that are close: a look around, no
benchmark.
"""

GENERAL_PROMPTS: dict[str, tuple[str, ...]] = {
    "people": (
        "a baker dusting flour off her hands at dawn",
        "an old fisherman mending a net on a wooden pier",
        "two children building a sandcastle before the tide comes in",
        "a violinist playing alone in an empty subway station",
        "a portrait of a woman with freckles and a green scarf, soft window light",
        "a crowd of commuters under umbrellas seen from above",
        "a grandfather teaching his grandson to ride a bicycle",
    ),
    "animals": (
        "a red fox asleep in fresh snow",
        "an octopus reaching into a glass jar",
        "a sparrow bathing in a puddle on a city street",
        "a herd of elephants crossing a shallow river at sunset",
        "a tabby cat looking at its reflection in a window",
        "a close-up of a dragonfly on a reed with dew on its wings",
        "a border collie leaping to catch a frisbee",
    ),
    "places": (
        "a narrow alley with laundry hanging between yellow houses",
        "a lighthouse on a cliff in a storm",
        "an abandoned greenhouse overgrown with ferns",
        "a night market with paper lanterns and steam rising from the stalls",
        "a mountain lake that mirrors the peaks, early morning mist",
        "the reading room of a grand old library, dust in the light",
        "a desert road that runs straight to the horizon",
    ),
    "objects": (
        "a cracked blue teapot on a linen tablecloth",
        "a brass pocket watch lying open on an old map",
        "a bowl of cherries beside a folded newspaper",
        "a pair of muddy hiking boots on a doorstep",
        "a glass paperweight with a dandelion inside",
        "a half-finished jigsaw puzzle on a carpet",
    ),
    "counting": (
        "three red apples on a white plate",
        "exactly two rowing boats on a calm lake",
        "five candles burning on a windowsill",
        "four owls sitting on one branch",
        "one empty chair in the middle of a large hall",
        "seven colourful balloons against a clear sky",
    ),
    "relations": (
        "a small dog sitting under a tall wooden table",
        "a blue book on top of a red book",
        "a bicycle leaning against a tree, a basket to the left of it",
        "a cat inside a cardboard box that stands on a sofa",
        "a yellow cup to the right of a black laptop",
        "a bridge above a train, and a balloon above the bridge",
    ),
    "text": (
        'a wooden sign that says "WELCOME" at the gate of a farm',
        'a chalkboard in a café with the word "SOUP" on it',
        'a birthday cake with "30" written in icing',
        'a neon sign reading "OPEN" in a dark street',
        'a postcard with the handwritten words "see you soon"',
    ),
    "attributes": (
        "a transparent umbrella with orange polka dots",
        "a purple carrot next to an orange aubergine",
        "a knitted armchair in a room made of stone",
        "a square watermelon cut in half",
        "a striped vase with white tulips and a plain vase with black tulips",
        "a rusty robot with brand new shiny hands",
    ),
    "styles": (
        "a watercolour of a harbour with fishing boats",
        "a pencil sketch of an oak tree in winter",
        "a flat vector illustration of a city park in spring",
        "a stained-glass window that shows a whale",
        "an oil painting of a thunderstorm over wheat fields, thick brush strokes",
        "a pixel-art castle on a floating island",
        "a paper-cut scene of deer in a forest, layered and lit from behind",
    ),
    "imagination": (
        "a teacup the size of a swimming pool with people swimming in it",
        "a train that runs along the rings of a planet",
        "a forest whose trees are giant feathers",
        "a snail carrying a tiny village on its shell",
        "a city where the streets are rivers of light",
    ),
}
