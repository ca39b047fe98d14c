"""`gapo audit`: from preference pairs to a ranked list of labels that are probably wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.audit_result import AuditResult

if TYPE_CHECKING:
    from gapo.runs.audit.audit_flow import audit, run_audit

__all__ = ["AuditConfig", "AuditResult", "audit", "run_audit"]


def __getattr__(name: str) -> Any:
    """What needs PyTorch, when it is first asked for; the settings and `gapo audit --help` do not."""
    if name not in ("audit", "run_audit"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gapo.runs.audit import audit_flow

    return getattr(audit_flow, name)
