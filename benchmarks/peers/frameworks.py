"""The job in the frameworks, as their own documentation shows it; imported when they are run.

All get the fused optimizer and a scheduler object, the latter because they ask for one.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.job import Batches, Job
from benchmarks.peers.loops import autocast


def fabric(job: Job) -> dict[str, Tensor]:
    """https://lightning.ai/docs/fabric"""  # noqa: D415
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]

    fabric = Fabric(
        accelerator="cpu",
        devices=job.world_size,
        strategy="ddp" if job.world_size > 1 else "auto",
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
    )
    fabric.launch()
    bare = job.model()
    model, optimizer = fabric.setup(bare, job.optimizer(bare))
    scheduler = job.schedule(optimizer.optimizer)
    batches, step = Batches(job), 0
    for _ in range(job.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            fabric.backward(loss)
            optimizer.step()
            scheduler.step()
            step += 1
            if not job.lean and step % 50 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
    return bare.state_dict()


def lightning(job: Job) -> dict[str, Tensor]:
    """https://lightning.ai/docs/pytorch"""  # noqa: D415
    import lightning as pl  # pyright: ignore[reportMissingImports]

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = job.model()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.net(images), labels)
            if not job.lean:
                self.log("train/loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = job.optimizer(self.net)
            scheduler = {"scheduler": job.schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    lean: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    net = Net()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=job.world_size,
        strategy="ddp" if job.world_size > 1 else "auto",
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
        max_epochs=job.epochs,
        use_distributed_sampler=False,
        default_root_dir=job.folder,
        **(lean if job.lean else {}),
    )
    trainer.fit(net, Batches(job))
    return net.net.state_dict()


def accelerate(job: Job) -> dict[str, Tensor]:
    """https://huggingface.co/docs/accelerate"""  # noqa: D415
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if job.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,  # else it steps once for each rank
    )
    bare = job.model()
    optimizer = job.optimizer(bare)
    model, optimizer, scheduler = accelerator.prepare(bare, optimizer, job.schedule(optimizer))
    batches: Any = Batches(job)
    for _ in range(job.epochs):
        bar = contextlib.nullcontext(batches)
        if not job.lean:
            from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

            bar = contextlib.nullcontext(tqdm(batches, mininterval=0.1))
        with bar as shown:
            for images, labels in shown:
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if not job.lean:
                    shown.set_postfix(loss=loss.item())
    return bare.state_dict()


def ignite(job: Job) -> dict[str, Tensor]:
    """https://pytorch-ignite.ai"""  # noqa: D415
    import ignite.distributed as idist  # pyright: ignore[reportMissingImports]
    from ignite.engine import Engine  # pyright: ignore[reportMissingImports]
    from ignite.handlers.tqdm_logger import ProgressBar  # pyright: ignore[reportMissingImports]
    from ignite.metrics import RunningAverage  # pyright: ignore[reportMissingImports]

    job.start_group()
    bare = job.model()
    model = idist.auto_model(bare)
    optimizer = job.optimizer(bare)
    scheduler = job.schedule(optimizer)

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> Any:
        images, labels = batch
        optimizer.zero_grad()
        with autocast(job):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss if job.lean else loss.item()

    trainer = Engine(update)
    if not job.lean:
        RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
        ProgressBar().attach(trainer, ["loss"])
    trainer.run(Batches(job), max_epochs=job.epochs)
    return bare.state_dict()


def hf_trainer(job: Job) -> dict[str, Tensor]:
    """https://huggingface.co/docs/transformers/main_classes/trainer"""  # noqa: D415
    from transformers import Trainer, TrainingArguments  # pyright: ignore[reportMissingImports]

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = job.model()

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(images)
            return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}

    class Named:
        """The batches as dictionaries."""

        def __init__(self) -> None:
            self._batches = Batches(job)

        def __len__(self) -> int:
            return len(self._batches)

        def __iter__(self) -> Any:
            return ({"images": x, "labels": y} for x, y in self._batches)

    class OnBatches(Trainer):
        def get_train_dataloader(self) -> Any:
            return Named()

    lean: dict[str, Any] = {"logging_strategy": "no", "disable_tqdm": True}
    model = Classifier()
    optimizer = job.optimizer(model)
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        use_cpu=True,
        bf16=job.precision == "bf16",
        per_device_train_batch_size=job.case.batch_size,
        max_steps=job.total_steps,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        **(lean if job.lean else {"logging_steps": 50}),
    )
    trainer = OnBatches(
        model=model,
        args=arguments,
        train_dataset=torch.utils.data.TensorDataset(torch.zeros(1)),
        optimizers=(optimizer, job.schedule(optimizer)),
    )
    trainer.train()
    return model.net.state_dict()
