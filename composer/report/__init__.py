"""The report: one HTML file that opens without a network, and the same as JSON.

Doors: `write_report`, and `write_clusters` for a zoo that is only looked at.
"""

from composer.report.record import RunRecord
from composer.report.write import write_clusters, write_report

__all__ = ["RunRecord", "write_clusters", "write_report"]
