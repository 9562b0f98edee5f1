"""The report: one HTML file that opens without a network, and the same as JSON.

Door: `write_report`.
"""

from composer.report.record import RunRecord
from composer.report.write import write_report

__all__ = ["RunRecord", "write_report"]
