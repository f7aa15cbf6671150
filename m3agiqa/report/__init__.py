"""One self-contained HTML file of what a folder of scores holds.

`gather` asks for the figures, `pictures` makes thumbnails, `drift` compares two runs, `charts` draws, `page` puts it
all together with the templates beside it, and `write` is what commands call.
"""

from m3agiqa.report.write import report_after, write_report

__all__ = ["report_after", "write_report"]
