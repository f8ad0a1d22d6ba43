"""Print a table over the kinds of models: a planted neuron, its search, and its repair as a RegViT and in place.

Run: python benchmarks/planted_families.py (about a minute, no weights needed).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hf_regvit import RetrofitError, add_test_time_registers, convert, find_register_neurons, repair_in_place
from hf_regvit.models.results import markdown_table
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, plant_neuron, sample


def main() -> None:
    """Print the table."""
    rows = [["model", "planted", "first neuron", "score", "second", "as a RegViT", "cosine", "in place", "cosine"]]
    seen, other = sample(64, seed=0), sample(64, seed=1)
    cells = torch.from_numpy(other.cells[0])

    def patches(model: torch.nn.Module) -> torch.Tensor:
        return TokenReader(model).read(other.pixels, layers=(3,)).patches()

    for name, make in MODELS.items():
        model = make()
        plant_neuron(model, seen)
        before, found = patches(model), find_register_neurons(model, seen.images, processor=PROCESSOR)
        first, second = found.scores.flatten().topk(2).values.tolist()
        repaired = add_test_time_registers(model if name == "regvit" else convert(model), found.best(1))
        made = [patches(repaired)]
        try:
            repair_in_place(model, found.best(1))
            made.append(patches(model))
        except RetrofitError:  # a RegViT
            pass
        shares = [f"{(after.norm(dim=-1) > found.cutoff).float().mean():.2%}" for after in made]
        cosines = [f"{torch.cosine_similarity(x, before, dim=-1)[~cells].mean():.5f}" for x in made]
        share = f"{(before.norm(dim=-1) > found.cutoff).float().mean():.2%}"
        results = [text for pair in zip(shares, cosines) for text in pair]
        rows.append([name, share, str(found.best(1)[0]), f"{first:.2f}", f"{second:.2f}", *results, *["-"] * 2][:9])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
