"""Strict schemas of Kubernetes kinds by version, and small ones of our custom resources."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import referencing

jsonschema: Any = pytest.importorskip("jsonschema")
kubernetes_validate: Any = pytest.importorskip(
    "kubernetes_validate.utils", reason="checking manifests needs kubernetes-validate"
)
OLDEST = (1, 28)
CRD_TOOL = Path(__file__).parents[3] / "shared/tools/validate_crds.py"

Schema = dict[str, Any]


def versions() -> list[str]:
    """From the oldest Kubernetes the chart takes to the newest known."""
    known = dict.fromkeys(kubernetes_validate.all_versions())
    return [version for version in known if _number(version) >= OLDEST]


def errors(manifest: dict[str, Any], version: str) -> list[str]:
    """What is wrong with a manifest of a built-in kind; unknown fields are."""
    api = manifest["apiVersion"]
    group, _, api_version = api.rpartition("/")
    name = f"{group.split('.')[0]}-{api_version}" if group else api_version
    validator = _validator(version, manifest["kind"].lower(), name)
    return [f"{'/'.join(map(str, e.path))}: {e.message}" for e in validator.iter_errors(manifest)]


def custom_errors(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a custom resource, by the operator's own definition where it is at hand
    and in any case by what of it we use, written down below."""
    key = (manifest["apiVersion"], manifest["kind"])
    validators = [jsonschema.Draft202012Validator(CUSTOM[key])]
    if definition := _definitions().get(key):
        validators.append(definition)
    return [
        f"{'/'.join(map(str, e.path))}: {e.message[:200]}"
        for validator in validators
        for e in validator.iter_errors(manifest)
    ]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def _registry(version: str) -> referencing.Registry[Any]:
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    contents = kubernetes_validate.schema_contents(f"{folder}/_definitions.json", version)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


@functools.cache
def _validator(version: str, kind: str, api: str) -> Any:
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    schema = kubernetes_validate.schema_contents(f"{folder}/{kind}-{api}.json", version)
    return jsonschema.Draft202012Validator(schema, registry=_registry(version))


@functools.cache
def _definitions() -> dict[tuple[str, str], Any]:
    """Of the operators, where the folder with them lies beside the checkout."""
    if not CRD_TOOL.exists() or not (CRD_TOOL.parents[1] / "crds").is_dir():
        return {}
    spec = importlib.util.spec_from_file_location("validate_crds", CRD_TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[tuple[str, str], Any] = module.validators()
    return found


STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
ANYTHING: Schema = {"type": "object"}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _resource(spec: Schema) -> Schema:
    metadata = _object({"name": STRING, "labels": STRINGS}, {"annotations": STRINGS})
    return _object({"apiVersion": STRING, "kind": STRING, "metadata": metadata, "spec": spec})


_POD_TEMPLATE = _object(
    {
        "metadata": _object({"labels": STRINGS}, {"annotations": STRINGS}),
        "spec": {"type": "object", "required": ["containers"]},
    }
)
_ISSUER_REF = _object({"name": STRING, "kind": {"enum": ["Issuer", "ClusterIssuer"]}})

CUSTOM: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayService"): _resource(
        _object(
            {
                "serveConfigV2": STRING,
                "rayClusterConfig": _object(
                    {
                        "rayVersion": STRING,
                        "headGroupSpec": _object(
                            {"rayStartParams": STRINGS, "template": _POD_TEMPLATE}
                        ),
                        "workerGroupSpecs": _list(
                            _object(
                                {
                                    "groupName": STRING,
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    "rayStartParams": STRINGS,
                                    "template": _POD_TEMPLATE,
                                }
                            )
                        ),
                    },
                    {
                        "authOptions": _object({"mode": {"const": "token"}}),
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": _object(
                            {
                                "upscalingMode": {
                                    "enum": ["Default", "Aggressive", "Conservative"]
                                },
                                "idleTimeoutSeconds": COUNT,
                                "securityContext": ANYTHING,
                            }
                        ),
                    },
                ),
            }
        )
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _resource(
        _object(
            {
                "scaleTargetRef": _object({"name": STRING}),
                "minReplicaCount": COUNT,
                "maxReplicaCount": COUNT,
                "pollingInterval": COUNT,
                "cooldownPeriod": COUNT,
                "advanced": ANYTHING,
                "triggers": _list(
                    _object(
                        {
                            "type": {"const": "prometheus"},
                            "metricType": {"enum": ["AverageValue", "Value"]},
                            "metadata": _object(
                                {"serverAddress": STRING, "query": STRING, "threshold": STRING}
                            ),
                        }
                    )
                ),
            }
        )
    ),
    ("cert-manager.io/v1", "Issuer"): _resource(
        {
            "oneOf": [
                _object({"selfSigned": _object({})}),
                _object({"ca": _object({"secretName": STRING})}),
            ]
        }
    ),
    ("cert-manager.io/v1", "Certificate"): _resource(
        _object(
            {
                "secretName": STRING,
                "duration": {"type": "string", "pattern": "^[0-9]+h$"},
                "issuerRef": _ISSUER_REF,
                "privateKey": _object(
                    {"algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}, "size": COUNT},
                    {"rotationPolicy": {"enum": ["Always", "Never"]}},
                ),
            },
            {
                "isCA": {"type": "boolean"},
                "commonName": STRING,
                "dnsNames": _list(STRING),
                "ipAddresses": _list(STRING),
                "usages": _list({"enum": ["digital signature", "server auth", "client auth"]}),
            },
        )
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _resource(
        _object(
            {
                "selector": _object({"matchLabels": STRINGS}),
                "endpoints": _list(
                    _object(
                        {
                            "port": STRING,
                            "path": STRING,
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                        }
                    )
                ),
            }
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _resource(
        _object({"groups": _list({"type": "object", "required": ["name", "rules"]})})
    ),
}
