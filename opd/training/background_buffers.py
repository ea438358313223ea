"""The buffers of a run whose rollouts are generated in the background, by a worker process or by servers."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from opd.core.errors import Refusal
from opd.core.tensors import placed
from opd.methods.method import Method
from opd.models import adapters
from opd.models import load as models
from opd.rollouts.buffer import Batches
from opd.rollouts.collector import RolloutRequest
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.rollouts.server_buffer import ServerBuffer
from opd.rollouts.worker.client import WorkerBuffer
from opd.rollouts.worker.messages import Job, WorkerSetup
from opd.training.session import Session

BatchRequest = Callable[[int], RolloutRequest]  # returns the request for this process's share of a batch


def server_buffer(session: Session, engine: VLLMServer, request: BatchRequest, batches: Batches) -> ServerBuffer:
    """Return a buffer whose batches servers generate; it begins with those of a checkpoint."""
    config, collector, verify = session.config, session.collector, session.prompts.task.verify
    return ServerBuffer(
        engine,
        session.method.rollouts,
        staleness=config.staleness,
        is_exact=config.exact_staleness,
        total=config.steps,
        request=request,
        sample=collector.sample,
        finish=lambda request, responses: collector.finish(request, responses, verify),
        batches=batches,
    )


def worker_buffer(
    session: Session, request: BatchRequest, batches: Batches, say: Callable[[str], object]
) -> WorkerBuffer:
    """Start a worker for this process and return its buffer; refuse a verifier that cannot be pickled."""
    task = session.prompts.task
    try:
        pickle.dumps(task.verify)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Refusal(
            f"--verifier: {task.verify!r} cannot be sent to the worker process ({error}); name a function of a module"
        ) from error

    def weights() -> dict[str, Tensor]:
        return {name: p for name, p in session.plain().model.named_parameters() if p.requires_grad}

    job = lambda number: Job(request(number))
    threads, setup = torch.get_num_threads(), _worker_setup(session)
    policy = session.method.rollouts
    return WorkerBuffer(setup, policy, weights=weights, job=job, threads=threads, batches=batches, say=say)


def _worker_setup(session: Session) -> WorkerSetup:
    """Return the first message to the worker, and give half of this process's cores to it if it needs them."""
    config = session.config
    accelerator, engine = session.accelerator, session.collector.student
    device = str(placed(accelerator.device))
    if config.worker_device != "same":
        device = str(models.device(config.worker_device, field="worker-device"))
    if accelerator.device.type == "cpu" and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # each process has its own cores
    model = session.plain().model
    # The base that the checkpoints name: --student may be a run folder that has moved on since.
    student = adapters.base_name(model) if isinstance(model, PeftModel) else config.student
    return WorkerSetup(
        config=replace(config, method=Method(), student=student),  # the worker may not have the user's own method
        folder=config.out / f".worker-{accelerator.process_index}-{os.getpid()}",  # no other trainer has this path
        size=engine.vocabulary,
        stop=engine.stop,
        vocabulary=session.collector.vocabulary,
        teachers=tuple(session.teachers),
        device=device,
        threads=torch.get_num_threads(),
        verify=session.prompts.task.verify,
    )
