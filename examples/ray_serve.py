"""Serve an NLD model on Ray: vLLM's own OpenAI server in every replica, which Ray Serve starts, watches and scales.

python examples/ray_serve.py --min-replicas 1 --max-replicas 4 --port 8000 -- "$(vllm-nld path tiny)" \
    --speculative-config '{"model": "vllm_nld.SelfSpeculation"}' --dtype float32 --max-model-len 2048

The arguments of ``vllm serve`` follow ``--``, except those of its HTTP port. A request picks its mode with
``vllm_xargs``, as usual. Ctrl-C ends the service. docs/operate/serving_at_scale.md compares it with ``vllm serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any

import ray
from ray import serve


def vllm_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments of ``vllm serve`` after its own checks; a wrong one ends the process."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before vLLM 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(argv)
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    return args


@serve.deployment
@serve.ingress()
class NLDServer:
    """A replica: an engine with vLLM's HTTP application, but no port of its own."""

    async def __init__(self, argv: list[str], cores: int, hang_timeout: float) -> None:
        """Start the engine.

        Args:
            argv: arguments of ``vllm serve``.
            cores: CPU cores per worker that this replica claims; 0 leaves the choice to vLLM.
            hang_timeout: seconds after which an engine that does not answer counts as dead.
        """
        from vllm_nld.serving import replica

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self.guard = replica.Guard()
        self.args = vllm_arguments(argv)
        if cores:
            replica.claim_cores(cores, self.args.tensor_parallel_size)
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        engine_args = AsyncEngineArgs.from_cli_args(self.args)
        self.engine = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)
        self.guard.forget_metrics_of(self.engine.vllm_config)
        self.hang_timeout = hang_timeout
        self.watch = asyncio.get_running_loop().create_task(replica.end_with(self.engine, hang_timeout))

    async def __serve_build_asgi_app__(self) -> Any:
        """Return vLLM's application; Ray Serve asks for it once."""
        try:
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.app import build_app
        except ImportError:  # before vLLM 0.32
            from vllm.entrypoints.openai.api_server import build_app, init_app_state

        tasks = await self.engine.get_supported_tasks()
        app = build_app(self.args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, self.args, tasks)
        # vLLM uses this to stop its HTTP server when the engine died; here the watch ends the process.
        app.state.server = SimpleNamespace(should_exit=False)
        return app

    async def check_health(self) -> None:
        """Raise if the engine is dead or silent; Ray Serve then replaces the replica."""
        from vllm_nld.serving.replica import check_engine

        await check_engine(self.engine, self.hang_timeout)

    async def __del__(self) -> None:
        """Stop the engine when Ray Serve removes the replica, without reporting it as dead."""
        self.watch.cancel()
        self.engine.shutdown()


def application(options: argparse.Namespace, argv: list[str]) -> serve.Application:
    """Return the application that :func:`ray.serve.run` starts.

    Args:
        options: options of this script.
        argv: arguments of ``vllm serve``.
    """
    args = vllm_arguments(argv)
    gpus = options.num_gpus
    if gpus is None:
        gpus = args.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    deployment = NLDServer.options(
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
            "upscale_delay_s": options.upscale_delay,
            "downscale_delay_s": options.downscale_delay,
            "look_back_period_s": 12,  # Ray counts requests every 10 seconds
        },
        max_ongoing_requests=options.max_requests,
        health_check_period_s=5,
        health_check_timeout_s=options.hang_timeout + 5,
        graceful_shutdown_timeout_s=options.drain,
    )
    return deployment.bind(argv, options.cores, options.hang_timeout)


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this script's options, and the arguments of ``vllm serve``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--min-replicas", type=int, default=1, help="replicas that always run (default: 1)")
    parser.add_argument("--max-replicas", type=int, default=1, help="replicas under load (default: 1)")
    parser.add_argument("--target-requests", type=float, default=32, help="running + queued, per replica (default: 32)")
    parser.add_argument(
        "--max-requests", type=int, default=128, help="most requests per replica; others queue (default: 128)"
    )
    parser.add_argument("--upscale-delay", type=float, default=10, help="seconds of overload before it (default: 10)")
    parser.add_argument(
        "--downscale-delay", type=float, default=300, help="seconds of idleness before it (default: 300)"
    )
    parser.add_argument("--drain", type=float, default=60, help="seconds to finish requests when stopped (default: 60)")
    parser.add_argument("--num-cpus", type=float, default=1.0, help="CPUs that Ray reserves per replica (default: 1)")
    parser.add_argument("--num-gpus", type=float, help="GPUs per replica (default: one per worker, if there are any)")
    parser.add_argument("--cores", type=int, default=0, help="without GPU: cores of each worker's own")
    parser.add_argument(
        "--hang-timeout", type=float, default=20, help="an engine silent for that long is dead (default: 20 s)"
    )
    parser.add_argument("--address", help="Ray cluster (default: a running one, or a new one on this machine)")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def build(args: dict[str, str]) -> serve.Application:
    """Return the application for a config file of Ray Serve (``import_path: ray_serve:build``).

    Args:
        args: under ``arguments`` those of this script, as one would type them. Ray Serve's own ``http_options`` say
            where it listens.
    """
    return application(*parse_arguments(shlex.split(args["arguments"])))


def main() -> None:
    """Serve until interrupted."""
    options, argv = parse_arguments(sys.argv[1:])
    ray.init(address=options.address, log_to_driver=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own handler of SIGTERM
        signal.signal(number, lambda *_: ended.set())
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(application(options, argv), name="nld")
    print(f"ray_serve: ready at http://{options.host}:{options.port}/v1", file=sys.stderr, flush=True)
    ended.wait()
    serve.shutdown()


if __name__ == "__main__":
    main()
