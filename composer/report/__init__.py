"""The report: one HTML file that opens without a network, and the same as JSON.

Doors: `write_report`, `write_clusters` for a zoo that is only looked at, and `evidence_table` and `merge_trees` for
pages that show a part of it.
"""

from composer.report.record import RunRecord
from composer.report.write import evidence_table, merge_trees, parts_style, write_clusters, write_report

__all__ = ["RunRecord", "evidence_table", "merge_trees", "parts_style", "write_clusters", "write_report"]
