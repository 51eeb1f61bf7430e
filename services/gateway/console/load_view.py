"""The load of every logical expert, now and over the long window, as the console shows it."""

from __future__ import annotations

from collections.abc import Mapping

from services.core.model_config import ModelConfig
from services.core.registry import Slot
from services.gateway.console.contract import HotExpert, LayerView, LoadView
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.windows import summed
from services.gateway.expert_load import expert_tokens, imbalance_of, ready_replicas, source_of

_NUM_HOTTEST = 8
_Rates = Mapping[Slot, float]


def build_load(fleet: FleetState, config: ModelConfig) -> LoadView:
    source = source_of(fleet.snapshot.shards)
    names = (
        [shard.shard_id for shard in fleet.snapshot.shards]
        if source == "shards"
        else [worker.worker_id for worker in fleet.snapshot.workers]
    )
    windows = [fleet.windows.of(name, fleet.read_at) for name in names]
    now, now_s = summed(each.now for each in windows) or (None, None)
    window, window_s = summed(each.window for each in windows) or (None, None)
    num_layers = config.num_hidden_layers if config.is_moe else 0
    num_experts = config.num_local_experts
    replicas = _replicas(fleet, num_layers, num_experts)
    tokens = expert_tokens(fleet.snapshot)
    layers: list[LayerView] = []
    for layer in range(num_layers):
        slots = [(layer, expert) for expert in range(num_experts)]
        layers.append(
            {
                "now": _layer_rates(now, slots),
                "window": _layer_rates(window, slots),
                "imbalance_now": _imbalance(now, slots),
                "imbalance": _imbalance(window, slots),
                "replicas": [replicas[slot] for slot in slots],
                "tokens": [tokens.get(slot, 0) for slot in slots],
            }
        )
    return {
        "source": source,
        "now_s": None if now_s is None else round(now_s, 2),
        "window_s": None if window_s is None else round(window_s, 2),
        "layers": layers,
        "hottest": _hottest(now or {}, replicas),
    }


def _replicas(fleet: FleetState, num_layers: int, num_experts: int) -> Mapping[Slot, int]:
    """Ready replicas of each slot. Without workers the experts are in the shards' processes."""
    workers = fleet.workers.all()
    if not workers:
        num_shards = len(fleet.snapshot.shards)
        return {(layer, e): num_shards for layer in range(num_layers) for e in range(num_experts)}
    return ready_replicas(each.record for each in workers if not each.is_lost)


def _layer_rates(rates: _Rates | None, slots: list[Slot]) -> list[float] | None:
    return None if rates is None else [round(rates.get(slot, 0.0), 2) for slot in slots]


def _imbalance(rates: _Rates | None, slots: list[Slot]) -> float | None:
    imbalance = imbalance_of([rates.get(slot, 0.0) for slot in slots]) if rates else None
    return None if imbalance is None else round(imbalance, 3)


def _hottest(now: _Rates, replicas: Mapping[Slot, int]) -> list[HotExpert]:
    of_layer: dict[int, float] = {}
    for (layer, _), rate in now.items():
        of_layer[layer] = of_layer.get(layer, 0.0) + rate
    ranked = sorted(now, key=lambda slot: (-now[slot], slot))[:_NUM_HOTTEST]
    return [
        {
            "layer": layer,
            "expert": expert,
            "tokens_per_second": round(now[layer, expert], 2),
            "share": round(now[layer, expert] / of_layer[layer], 4),
            "replicas": replicas.get((layer, expert), 0),
        }
        for layer, expert in ranked
    ]
