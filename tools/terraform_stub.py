"""A provider without a cloud: serves the schema excerpts to Terraform, so that it validates, plans and tests offline.

    python tools/terraform_stub.py        prints one line for TF_REATTACH_PROVIDERS, and serves until its input ends

Terraform then takes this process for ``hashicorp/aws`` and ``hashicorp/google`` and downloads nothing. A plan gives
back the configuration, with what only a provider knows left unknown; an apply puts something of the right type in its
place. So a run here proves that every argument exists, that references lead somewhere, and what the documents in it
say. It proves nothing about AWS or Google Cloud.

Needs ``tf`` (the protocol's generated classes), ``grpcio`` and ``msgpack``. The protocol is Terraform's plugin protocol
6.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import msgpack
from tf.gen import grpc_controller_pb2 as controller
from tf.gen import grpc_controller_pb2_grpc as controller_rpc
from tf.gen import grpc_stdio_pb2_grpc as stdio_rpc
from tf.gen import tfplugin_pb2 as pb
from tf.gen import tfplugin_pb2_grpc as rpc

SCHEMAS = Path(__file__).resolve().parent.parent / "tests" / "terraform" / "schema"
UNKNOWN = msgpack.ExtType(0, b"\x00")

_WORD = {"type": "string", "computed": False, "optional": True, "required": False}
#: What a provider block may say: enough for ours.
CONFIGURATION: dict[str, tuple[str, ...]] = {
    "aws": ("region", "profile"),
    "google": ("project", "region", "zone"),
}
#: Where a provider is whose configuration does not say.
REGION = "us-east-1"
#: What data sources answer.
ANSWERS: dict[str, dict[str, Any]] = {
    "aws_partition": {"partition": "aws", "dns_suffix": "amazonaws.com", "id": "aws"},
    "google_project": {"number": "123456789012"},
    "google_storage_project_service_account": {
        "email_address": "service-123456789012@gs-project-accounts.iam.gserviceaccount.com"
    },
}


def _attribute(name: str, said: Mapping[str, Any]) -> Any:
    words = {
        "name": name,
        "required": said["required"],
        # One of the three must be set.
        "optional": said["optional"] or not (said["required"] or said["computed"]),
        "computed": said["computed"],
    }
    if "nested" in said:
        inside = [_attribute(key, value) for key, value in said["block"]["attributes"].items()]
        nested = pb.Schema.Object(nesting=getattr(pb.Schema.Object, said["nested"]), attributes=inside)
        return pb.Schema.Attribute(nested_type=nested, **words)
    return pb.Schema.Attribute(type=json.dumps(said["type"]).encode(), **words)


def _block(said: Mapping[str, Any]) -> Any:
    return pb.Schema.Block(
        attributes=[_attribute(name, value) for name, value in said["attributes"].items()],
        block_types=[
            pb.Schema.NestedBlock(
                type_name=name,
                block=_block(value["block"]),
                nesting=getattr(pb.Schema.NestedBlock, value["nesting"]),
                min_items=value["min"],
                max_items=value["max"],
            )
            for name, value in said["blocks"].items()
        ],
    )


def _something(kind: Any, name: str) -> Any:
    """A value of a type, for what only a provider knows."""
    simple = {"string": f"stub-{name}", "number": 0, "bool": False}
    if isinstance(kind, str):
        return simple.get(kind)
    return {"list": [], "set": [], "map": {}}.get(kind[0]) if isinstance(kind, list) else None


def _unpacked(value: Any) -> Any:
    return msgpack.unpackb(value.msgpack, raw=False, strict_map_key=False) if value.msgpack else None


def _packed(value: Any) -> Any:
    return pb.DynamicValue(msgpack=msgpack.packb(value))


class Provider(rpc.ProviderServicer):  # type: ignore[misc, unused-ignore]  # generated, without types
    """One provider.

    Args:
        name: of the excerpt.
    """

    def __init__(self, name: str) -> None:
        self._excerpt = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
        self._configuration = {"attributes": dict.fromkeys(CONFIGURATION[name], _WORD), "blocks": {}}
        # What the real provider knows in a plan already: aws 6 writes its own region into every resource.
        self._known: dict[str, Any] = {"region": REGION}

    def _attributes(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._excerpt[kind][name]["attributes"]
        return found

    def GetMetadata(self, request: Any, context: Any) -> None:  # noqa: N802, ARG002 - the protocol's
        """Optional; Terraform asks for the schema then."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")

    def GetProviderSchema(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """Every type of the excerpt."""

        def schemas(kind: str) -> dict[str, Any]:
            return {name: pb.Schema(block=_block(said)) for name, said in self._excerpt[kind].items()}

        return pb.GetProviderSchema.Response(
            provider=pb.Schema(block=_block(self._configuration)),
            resource_schemas=schemas("resource"),
            data_source_schemas=schemas("data"),
            server_capabilities=pb.ServerCapabilities(plan_destroy=False),
        )

    def ValidateProviderConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """Terraform has compared it with the schema."""
        return pb.ValidateProviderConfig.Response()

    def ValidateResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """The same."""
        return pb.ValidateResourceConfig.Response()

    def ValidateDataResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """The same."""
        return pb.ValidateDataResourceConfig.Response()

    def ConfigureProvider(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """There is nothing to connect to; the region is kept for what is planned next."""
        self._known["region"] = (_unpacked(request.config) or {}).get("region") or REGION
        return pb.ConfigureProvider.Response()

    def UpgradeResourceState(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """A state is taken as it is."""
        return pb.UpgradeResourceState.Response(upgraded_state=pb.DynamicValue(json=request.raw_state.json))

    def ReadResource(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """Nothing has changed."""
        return pb.ReadResource.Response(new_state=request.current_state)

    def PlanResourceChange(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """The configuration; of a new resource what only a provider knows is unknown."""
        value, prior = _unpacked(request.proposed_new_state), _unpacked(request.prior_state)
        if value is not None and prior is None:
            for name, said in self._attributes("resource", request.type_name).items():
                if said["computed"] and value.get(name) is None:
                    value[name] = self._known.get(name, UNKNOWN)
        return pb.PlanResourceChange.Response(planned_state=_packed(value))

    def ApplyResourceChange(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """As planned, with something in place of what was unknown."""
        value = _unpacked(request.planned_state)
        if value is not None:
            for name, said in self._attributes("resource", request.type_name).items():
                if isinstance(value.get(name), msgpack.ExtType):
                    value[name] = _something(said.get("type"), name)
        return pb.ApplyResourceChange.Response(new_state=_packed(value))

    def ReadDataSource(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """What ``ANSWERS`` says."""
        value = _unpacked(request.config)
        answers = ANSWERS.get(request.type_name, {})
        for name, said in self._attributes("data", request.type_name).items():
            if said["computed"] and value.get(name) is None:
                value[name] = answers.get(name, _something(said.get("type"), name))
        return pb.ReadDataSource.Response(state=_packed(value))

    def StopProvider(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """There is nothing to stop."""
        return pb.StopProvider.Response()

    def GetFunctions(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """There are none."""
        return pb.GetFunctions.Response()


class Controller(controller_rpc.GRPCControllerServicer):  # type: ignore[misc, unused-ignore]  # the same
    """The plugin library's own service: Terraform says when it is done with a plugin that it has started itself."""

    def Shutdown(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """It has not started this one."""
        return controller.Empty()


class Stdio(stdio_rpc.GRPCStdioServicer):  # type: ignore[misc, unused-ignore]  # the same
    """The plugin library's own service for a plugin's output."""

    def StreamStdio(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the protocol's
        """There is none."""
        return iter(())


def serve(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A running server on a socket in a folder, and what Terraform needs to know of it."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(8), options=unlimited)
    rpc.add_ProviderServicer_to_server(Provider(name), server)
    controller_rpc.add_GRPCControllerServicer_to_server(Controller(), server)
    stdio_rpc.add_GRPCStdioServicer_to_server(Stdio(), server)
    socket = folder / f"{name}.sock"
    server.add_insecure_port(f"unix://{socket}")
    server.start()
    about = {
        "Protocol": "grpc",
        "ProtocolVersion": 6,
        "Pid": os.getpid(),
        "Test": True,
        "Addr": {"Network": "unix", "String": str(socket)},
    }
    return server, {f"hashicorp/{name}": about}


def main() -> int:
    """Serve until whoever has started this closes its input."""
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        servers = []
        found: dict[str, Any] = {}
        for name in CONFIGURATION:
            server, about = serve(name, Path(folder))
            servers.append(server)
            found |= about
        print(json.dumps(found), flush=True)
        sys.stdin.read()
        for server in servers:
            server.stop(grace=None).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
