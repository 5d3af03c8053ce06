"""Digests of what trainer and engine hold, and where they differ."""

from fp8sync.audit.report import AuditReport, Difference, Entry

__all__ = ["AuditReport", "Difference", "Entry"]
