"""The command benchmark: measures models in several formats, prints tables and writes a page."""

from collections.abc import Sequence

from funmatch.config.finished.benchmark import Benchmark
from funmatch.reports import benchmark_page
from funmatch.reports.result import Result
from funmatch.runtime.log import info, print_line, print_table
from funmatch.shipping.benchmark.measure import measure
from funmatch.training.student.build import Modules


def run(options: Benchmark, given: Modules | None = None) -> Result:
    """Measures the models; writes the page where one is wanted.

    Raises:
        InputError: as of `measure`.
    """
    metrics = measure(options, given)
    page = benchmark_page.write_page(options.report.expanduser(), metrics) if options.report else None
    return Result(None, metrics, page)


def show(result: Result) -> None:
    """Prints what was measured, where and how, and its two tables."""
    metrics = result.metrics
    for name, value in benchmark_page.about(metrics):
        print_line(f"{name}: {value}")
    # A table for each model: names of models and formats together would not fit a narrow terminal.
    for model in dict.fromkeys(each["model"] for each in metrics["results"]):
        rows = [each for each in metrics["results"] if each["model"] == model]
        name = benchmark_page.format_of
        print_table(model or "files", _narrow(benchmark_page.COLUMNS), benchmark_page.rows(rows, name))
        if found := benchmark_page.details(rows, name):
            title = "times of one image (ms), best batch, peak memory (MB)"
            print_table(title, _narrow(benchmark_page.DETAILS), found)
    for line in benchmark_page.reasons(metrics["results"]):
        info(line)
    if result.page:
        print_line(f"report: {result.page}")


def _narrow(columns: Sequence[str]) -> list[str]:
    """Shortens the columns' titles, so that a row fits 80 characters."""
    return [{"size (MB)": "MB", "memory (MB)": "MB"}.get(each, each) for each in columns]
