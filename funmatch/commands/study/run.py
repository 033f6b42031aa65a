"""Runs a study, or only redraws it, and writes its page."""

from pathlib import Path
from typing import Any

from funmatch.commands.study import files as study_files
from funmatch.commands.study import results as study_results
from funmatch.commands.study import runner, spec
from funmatch.commands.study.spec import StudySpec
from funmatch.config import Study
from funmatch.errors import InputError
from funmatch.reports import study_page
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table


def read(folder: Path) -> tuple[StudySpec, list[dict[str, Any]]]:
    source, results = folder / "study.toml", study_results.results(folder)
    if not source.is_file() or not results:
        raise InputError(f"{folder} holds no results of a study; run it first: funmatch study NAME --out {folder}")
    return spec.read_spec(source.read_text(), str(source)), results


def show(result: Result) -> None:
    """Prints the table of a study, or the list of built-in studies."""
    if result.folder is None:
        show_studies(result.metrics)
        return
    # From the folder, not from memory: it may hold runs that this call left out by --only.
    plan, results = read(result.folder)
    results = study_page.visible(results)
    print_table(plan.title, list(study_page.columns(results)), study_page.rows(results))
    print_line(f"report: {result.page}")


def run(config: Study) -> Result:
    """Runs a study (or only redraws it) and writes its page; without a name, lists the studies.

    Returns:
        what `runner.run` returns, with `table`, and the page.

    Raises:
        WorkFailed: runs failed; the page shows the others.
    """
    if not config.name:
        return Result(None, list_studies())
    # Before the file is looked for: a study can be redrawn without it, from its folder.
    if config.draw:
        folder = (config.out or runner.default_folder(config)).expanduser().resolve()
        return _with_page(folder, {"study": str(folder)})
    figures = runner.run(config)
    folder = Path(figures["study"])
    # Without a finished run there is nothing to draw.
    result = _with_page(folder, figures) if figures["finished"] else Result(folder, figures)
    # After the page, which shows the runs that did not fail.
    runner.check_all_finished(figures)
    return result


def _with_page(folder: Path, metrics: dict[str, Any]) -> Result:
    written = study_page.write_page(folder, *read(folder))
    return Result(folder, metrics | {"table": written["table"]}, Path(written["report"]))


def list_studies() -> dict[str, str]:
    """The built-in studies, and their titles."""
    return study_files.built_in()


def show_studies(found: dict[str, str]) -> None:
    print_table("studies", ["name", "about"], [[name, title] for name, title in found.items()])
    print_line("funmatch study NAME runs one; NAME may also be a file of your own (.toml)")
