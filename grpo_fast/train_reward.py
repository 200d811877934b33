"""Train a reward model that rates a reply on every objective at once: `python -m grpo_fast.train_reward`.

Ratings and preferences of any of the public schemas go in; a multi-head checkpoint comes out, with a report that says
head by head how far it can be trusted. Without arguments it trains the miniature's reward model.
"""

from itertools import islice

from grpo_fast.config.command_line import TRAIN_REWARD, parse
from grpo_fast.config.resolve import device_named, run_folder
from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.errors import UserError
from grpo_fast.models.reward_backbone import length_limit
from grpo_fast.models.reward_fit import (
    TrainingSet,
    example_batches,
    finite_loss,
    make_optimizer,
    steps_of,
    update,
)
from grpo_fast.models.reward_quality import measure
from grpo_fast.models.reward_text import encode_examples
from grpo_fast.optim.optimizer import learning_rate
from grpo_fast.parallel.world import world_size
from grpo_fast.reward_plan import print_reward_plan
from grpo_fast.reward_task import Rated, build_model, check_ratings, findings, sample_rows, write_results
from grpo_fast.run.command import prepare_libraries, run_command
from grpo_fast.run.live import Run, run_to_the_end
from grpo_fast.run.metrics import RunLogger
from grpo_fast.state import Steps, restore, resumed_logger
from grpo_fast.watch import follow


def train_reward(config: RewardConfig, rated: Rated, run: Run) -> int:
    """One whole run: put new heads on the backbone, train them, measure them, write model and report.

    Returns the exit code: 0, or 130 when it was interrupted, with everything saved.
    """
    optim = config.optim
    model = build_model(config, rated)
    data = TrainingSet.of(model, rated.training.examples, max_tokens=config.data.max_tokens, seed=config.seed)
    # A held-out reply that is too long is refused now, not after the training.
    limit = length_limit(model.model.config, config.data.max_tokens)
    encode_examples(model.tokenizer, rated.heldout.examples, max_tokens=limit)
    optimizer = make_optimizer(
        model,
        config.loss,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        kind=optim.optimizer,
    )
    total = steps_of(len(rated.training.examples), optim.batch_size, config.run.epochs)
    first = restore(run.path, model, optimizer).step
    run.begin("reward_model", total, done=first)
    run.check_stop()

    batches = example_batches(data.lengths(), optim.batch_size, total, config.seed)
    with Steps(run, config.run, model, optimizer, steps=total, first=first) as steps:
        for step, chosen in zip(steps, islice(batches, first, None), strict=False):
            lr = learning_rate(
                step,
                lr=optim.lr,
                warmup_steps=round(optim.warmup * total),
                total_steps=total,
                schedule="cosine",
            )
            with run.phase_timer("update"):
                metrics = update(
                    model, optimizer, data, chosen, config.loss, lr=lr, token_budget=optim.token_budget
                )
            finite_loss(metrics["loss"], step + 1, optim.lr)
            steps.taken(metrics)
            steps.finish()
            if run.stop_requested:
                write_results(run, config, rated, model, data, None, steps=steps.done)
            run.check_stop()

        model.eval()
        with run.phase_timer("save"):
            model.save(run.path / "model")
        with run.phase_timer("measure"):
            quality = measure(
                model,
                rated.training.examples,
                rated.heldout.examples,
                probes=config.run.probes,
                texts=rated.probe_texts,
                token_budget=optim.token_budget,
                max_tokens=config.data.max_tokens,
                seed=config.seed,
            )
        run.logger.samples(sample_rows(model, rated.heldout, steps.done, config.run.samples))
        model.save_measured(run.path / "model")
        write_results(run, config, rated, model, data, quality, steps=steps.done)
    for line in findings(model, rated):
        run.progress.message(line)
    run.progress.message(f"report: {run.path / 'report.html'}  model: {run.path / 'model'}")
    return 0


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit code 0 when done, 2 after bad input, 130 when interrupted."""
    run_command(lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
    asked = parse(argv, TRAIN_REWARD)
    if asked.watch:
        return follow(asked.watch)
    config = asked.config
    if world_size() > 1:
        raise UserError("a reward model is trained by one process: start it without torchrun")
    prepare_libraries(config.threads)
    device_named(config.device)
    rated = check_ratings(config)
    if asked.dry_run:
        print_reward_plan(config, rated)
        return 0
    wandb = "grpo_fast" if config.run.wandb else None
    if asked.resume:
        logger = resumed_logger(
            asked.resume,
            phase="reward_model",
            longer="--run.epochs",
            steps=steps_of(len(rated.training.examples), config.optim.batch_size, config.run.epochs),
            config_toml=to_toml(config),
            wandb_project=wandb,
        )
    else:
        folder = run_folder(config.output_dir, config.name, config.backbone.model or "miniature-reward")
        logger = RunLogger.create(folder, config_toml=to_toml(config), wandb_project=wandb)
    return run_to_the_end(logger, TRAIN_REWARD.module, lambda run: train_reward(config, rated, run))


if __name__ == "__main__":
    main()
