"""Writes what the folders say into the pages: tables and figures of the studies, and experiments/README.md.

A study is a folder with a study.gin; its results.jsonl is that of `orogen sweep`. A later design NAME.gin beside it,
with a SweepConfig, has NAME.jsonl and NAME.png. Only what stands between the marks `<!-- table -->`, or
`<!-- table NAME -->`, and `<!-- end -->` of a page is written.

PYTHONPATH=src python experiments/page.py            writes tables, and figures of folders that do not draw their own
PYTHONPATH=src python experiments/page.py --check    exits with 1 if a page is not what would be written
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.load import load_sweep
from orogen.config.sweep import SweepConfig
from orogen.sweep import table

HERE = Path(__file__).parent
NOT_RUN = "has not been run"
FIRST = "study"
MOST_NUMBERS = 2  # of each design, where a folder has several


class Study(NamedTuple):
    """A design in a folder, and the rows of its table; none before it has been run. name: of its file, without .gin."""

    folder: Path
    sweep: SweepConfig
    lines: list[dict[str, Any]]
    name: str = FIRST

    @property
    def is_run(self) -> bool:
        return any(not line["search"] for line in self.lines)

    @property
    def mark(self) -> str:
        return "table" if self.name == FIRST else f"table {self.name}"

    @property
    def figure(self) -> Path:
        return self.folder / ("figure.png" if self.name == FIRST else f"{self.name}.png")

    def rows(self, number: str | None = None) -> list[table.Row]:
        done: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {arm.values: {} for arm in self.sweep.arms()}
        for line in self.lines:
            if not line["search"]:
                done[tuple(line["arm"])][line["seed"]] = line
        return table.compared(self.sweep, done, number)


def studies() -> list[Study]:
    """All designs; those of a folder follow one another, the first one first."""
    found = []
    for first in sorted(HERE.glob(f"*/{FIRST}.gin")):
        others = [file for file in sorted(first.parent.glob("*.gin")) if file != first]
        for file in (first, *(file for file in others if "SweepConfig" in file.read_text())):
            results = first.parent / ("results.jsonl" if file == first else f"{file.stem}.jsonl")
            lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
            found.append(Study(first.parent, load_sweep([file])[0], lines, file.stem))
    return found


def title(folder: Path) -> str:
    return (folder / "README.md").read_text().splitlines()[0].removeprefix("# ")


def paragraph(folder: Path, name: str) -> str:
    """The text after the first `**name.**`, or the last verdict, up to an empty line, in one line; empty if there is
    none."""
    found = re.findall(
        rf"^\*\*{name}\.\*\* (.*?)(?:\n\n|\Z)", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return " ".join(found[-1 if name == "Verdict" else 0].split()) if found else ""


def written(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of that name. Raises ValueError if it has none."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, mark, rest = page.partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"a page has no marks <!-- {name} --> and <!-- end -->; expected both")
    return before + begin + text + rest[rest.index(end) :]


def study_page(designs: list[Study]) -> str:
    """The page of a folder, with the table of each of its designs."""
    page = (designs[0].folder / "README.md").read_text()
    for study in designs:
        text = table.markdown(study.sweep, study.rows()) if study.is_run else f"It {NOT_RUN}.\n"
        page = written(page, study.mark, text)
    return page


def effects(study: Study, number: str) -> str:
    """The control's mean, and each arm's difference from it with its interval."""
    control, *others = study.rows(number)
    parts = [f"{number}: {control.name} {control.metric_n.mean():.4g}"]
    for row in others:
        assert row.effect is not None
        effect = row.effect
        parts.append(f"{row.name} {effect.difference:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}]")
    return "; ".join(parts)


def cost(designs: list[Study]) -> str:
    lines = [line for study in designs for line in study.lines]
    return f"{len(lines)} runs, {math.fsum(line['seconds'] for line in lines) / 60:.0f} min of steps"


def study_cells(folder: Path, designs: list[Study]) -> list[str]:
    """Effect, verdict and cost; the page of a folder whose runs are no sweep says them itself."""
    if not designs:
        return [paragraph(folder, "Effect"), paragraph(folder, "Verdict"), paragraph(folder, "Cost")]
    done = [study for study in designs if study.is_run]
    if not done:
        return ["–", NOT_RUN, "–"]
    several = len(done) > 1
    numbers = [
        (f"{study.name}: " if several else "") + effects(study, number)
        for study in done for number in study.sweep.numbers[: MOST_NUMBERS if several else None]
    ]  # fmt: skip
    return ["<br>".join(numbers), paragraph(folder, "Verdict"), cost(done)]


def results_page(found: list[Study]) -> str:
    """experiments/README.md. Folders with a study.gin or a verdict are studies."""
    sweeps: dict[Path, list[Study]] = {}
    for study in found:
        sweeps.setdefault(study.folder, []).append(study)
    folders = sorted(file.parent for file in HERE.glob("*/README.md"))
    are_studies = [folder for folder in folders if folder in sweeps or paragraph(folder, "Verdict")]
    lines = ["| question | effect, paired by seed [95 %] | verdict | cost |", "|---" * 4 + "|"]
    for folder in are_studies:
        cells = [f"[{title(folder)}]({folder.name}/README.md)", *study_cells(folder, sweeps.get(folder, []))]
        lines.append("| " + " | ".join(cells) + " |")
    page = written((HERE / "README.md").read_text(), "studies", "\n".join(lines) + "\n")
    lines = ["| folder | asks | cost |", "|---" * 3 + "|"]
    for folder in folders:
        if folder not in are_studies:
            spent = paragraph(folder, "Cost") or paragraph(folder, "Cost on the GPU") or "–"
            lines.append(f"| [{folder.name}]({folder.name}/README.md) | {title(folder)} | {spent} |")
    return written(page, "folders", "\n".join(lines) + "\n")


def pages(found: list[Study]) -> dict[Path, str]:
    """What each page should be, by its path."""
    folders = dict.fromkeys(study.folder for study in found)
    return {
        **{folder / "README.md": study_page([one for one in found if one.folder == folder]) for folder in folders},
        HERE / "README.md": results_page(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check, found = parser.parse_args().check, studies()
    texts = pages(found)
    stale = [path for path, text in texts.items() if path.read_text() != text]
    if check:
        sys.exit("".join(f"{path} is not what the results say\n" for path in stale) or 0)
    for path in stale:
        path.write_text(texts[path])
    for study in found:
        if study.is_run and not (study.folder / "fit.py").exists():
            table.draw(study.figure, study.sweep, study.rows())


if __name__ == "__main__":
    main()
