"""HTML reports: pictures, charts and pages."""

from .charts import require_matplotlib
from .demo import DemoResult, demo_report

__all__ = ["DemoResult", "demo_report", "require_matplotlib"]
