"""Reports: one self-contained page with the curves, samples and settings of runs (``lit-instruct report``)."""

from __future__ import annotations

from lit_instruct.reporting.report import write_report

__all__ = ["write_report"]
