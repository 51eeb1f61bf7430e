"""All faults, in the order they are run."""

from __future__ import annotations

from tests.faults import (
    client_faults,
    machine_faults,
    network_faults,
    process_faults,
    store_faults,
)
from tests.faults.fault import Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for module in (process_faults, network_faults, store_faults, machine_faults, client_faults)
    for fault in module.FAULTS
}
