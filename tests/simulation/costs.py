"""What a fleet costs where it is linear: so many members, tenants and seconds times so much each. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Costs"]


@dataclass(frozen=True, slots=True)
class Costs:
    script_seconds: float
    script_in_bytes: float
    script_out_bytes: float
    look_seconds: float
    look_in_bytes: float
    look_out_bytes: float
    stamp_seconds: float
    stamp_in_bytes: float
    stamp_out_bytes: float
    copy_inside_seconds: float
    copy_seconds: float
    message_bytes: float
    ping_seconds: float
    ping_in_bytes: float
    report_seconds: float
    report_in_bytes: float
    reported_seconds: float
    reported_bytes: float
    connection_bytes: float
    member_look_seconds: float
    member_stamp_seconds: float
    member_message_seconds: float
