"""What the study compares: ways to choose, shares of the data, seeds, and how long it trains."""

from dataclasses import dataclass

METHODS = ("random", "margin_only", "quality_only", "diversity_only", "fifa", "greedy")
TITLES = {
    "all": "all pairs",
    "random": "random",
    "margin_only": "margin only",
    "quality_only": "quality only",
    "diversity_only": "diversity only",
    "fifa": "FiFA",
    "greedy": "FiFA, greedy",
}


@dataclass(frozen=True)
class Cell:
    """One selection: a method at a share of the data; `random` chooses anew for each seed."""

    method: str
    share: float
    selection_size: int
    selection_seed: int = 0
    num_seeds: int = 1

    @property
    def name(self) -> str:
        """Name of its run."""
        if self.method == "all":
            return "all"
        seed = f"-r{self.selection_seed}" if self.method == "random" else ""
        return f"{self.method}-{self.share * 100:g}{seed}"


@dataclass(frozen=True)
class Trained:
    """One training of a cell; shorter ones are the first steps of the full length's."""

    name: str
    seed: int
    optimizer_steps: int


def model_name(cell: Cell, trained: Trained) -> str:
    """Name of a training's model among all of the study."""
    return f"{cell.name}-{trained.name}"


@dataclass(frozen=True)
class Design:
    """The whole plan. Shares are of the labelled pairs; batch and rates are the demo preset's.

    Methods train for `optimizer_steps` whatever their share (equal compute); all pairs for so many
    and once through. FiFA is also stopped at `ladder` shares of its steps, to see how few it needs.
    """

    num_pairs: int = 24_000
    num_prompts: int = 2_200
    shares: tuple[float, ...] = (0.005, 0.01, 0.05, 0.10)
    methods: tuple[str, ...] = METHODS
    num_seeds: int = 3
    optimizer_steps: int = 50
    batch_size: int = 32
    ladder: tuple[float, ...] = (0.125, 0.25, 0.5)

    def cells(self, num_labelled: int) -> list[Cell]:
        """Every selection, the whole dataset last."""
        cells = []
        for share in self.shares:
            size = max(1, round(share * num_labelled))
            for method in self.methods:
                if method == "random":
                    cells += [Cell(method, share, size, seed) for seed in range(self.num_seeds)]
                else:
                    cells.append(Cell(method, share, size, 0, self.num_seeds))
        return [*cells, Cell("all", 1.0, num_labelled, 0, self.num_seeds)]

    def trainings(self, cell: Cell) -> list[Trained]:
        """Every training of a cell."""
        first = cell.selection_seed
        seeds = range(first, first + cell.num_seeds)
        steps = [self.optimizer_steps]
        if cell.method == "all":
            steps.append(max(steps[0] + 1, -(-cell.selection_size // self.batch_size)))
        elif cell.method == "fifa":
            steps += [max(1, round(share * steps[0])) for share in self.ladder]
        return [Trained(f"s{seed}-{count}", seed, count) for seed in seeds for count in steps]
