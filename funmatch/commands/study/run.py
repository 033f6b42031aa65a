"""Runs a study, or redraws it, and writes its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.commands.study import files as study_files
from funmatch.commands.study import results as study_results
from funmatch.commands.study import runner, spec
from funmatch.commands.study.spec import StudySpec
from funmatch.config import Study
from funmatch.errors import InputError
from funmatch.reports import study_page
from funmatch.runtime.log import print_table


def read(folder: Path) -> tuple[StudySpec, list[dict[str, Any]]]:
    source, results = folder / "study.toml", study_results.results(folder)
    if not source.is_file() or not results:
        raise InputError(
            f"{folder} holds no results of a study; its runs come first: funmatch study NAME --out {folder}"
        )
    return spec.read_spec(source.read_text(), str(source)), results


def show(figures: Mapping[str, Any]) -> None:
    """The table of a study on the terminal."""
    plan, results = read(Path(figures["study"]))
    results = study_page.visible(results)
    print_table(plan.title, list(study_page.columns(results)), study_page.rows(results))
    print(f"report: {figures['report']}")


def run(config: Study) -> dict[str, Any]:
    """Carries out a study (or only draws it again) and writes its page.

    Returns:
        as `series.run`, and `report` and `table`.

    Raises:
        WorkFailed: runs failed; the page shows the others.
    """
    if config.draw:
        folder = (config.out or runner.default_folder(config)).expanduser().resolve()
        return {"study": str(folder), **study_page.write_page(folder, *read(folder))}
    figures = runner.run(config)
    if figures["finished"]:
        figures |= study_page.write_page(Path(figures["study"]), *read(Path(figures["study"])))
    runner.check_all_finished(figures)
    return figures


def list_studies() -> dict[str, str]:
    """The studies that come with the program, and their titles."""
    return study_files.built_in()


def show_studies(found: Mapping[str, str]) -> None:
    print_table("studies", ["name", "about"], [[name, title] for name, title in found.items()])
    print("funmatch study NAME carries one out; a file of your own (.toml) will do, too")
