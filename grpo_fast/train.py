"""Align a language model on several objectives at once: `python -m grpo_fast.train`.

The algorithm, top to bottom: sample a group of completions for each prompt, score every completion on every
objective, compare each with its group, and push the policy towards what scored better (GRPO, arXiv 2402.03300,
with the multi-objective rewards of arXiv 2503.21819). Without arguments it runs on the embedded miniature world.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from grpo_fast.attention.backends import use
from grpo_fast.budget import TokenBudget
from grpo_fast.config.command_line import TRAIN, parse
from grpo_fast.config.resolve import loss_config, resolve_device, run_path, select_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.constraint import Multipliers
from grpo_fast.data.queue import PromptQueue
from grpo_fast.dumps import Dumps
from grpo_fast.engines.choose import engine_of, generating
from grpo_fast.errors import UserError
from grpo_fast.evaluate import evaluate, means
from grpo_fast.fit import fitted
from grpo_fast.grpo import update
from grpo_fast.miniature.setup import prepare
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.optim.optimizer import Optimizer, learning_rate
from grpo_fast.parallel.job import job
from grpo_fast.pipeline import Pipeline
from grpo_fast.plan import print_plan
from grpo_fast.rollout import rollout_metrics
from grpo_fast.run.command import prepare_libraries, run_command
from grpo_fast.run.follow import note_ending
from grpo_fast.run.live import Run, opened, run_to_the_end
from grpo_fast.run.metrics import RunLogger
from grpo_fast.state import (
    Steps,
    check_data,
    goes_ahead,
    is_due,
    restore,
    resumed_logger,
    save_evaluation,
    saved_evaluation,
)
from grpo_fast.summary import sample_rows, write_results
from grpo_fast.task import Inputs, check_inputs, load
from grpo_fast.trust.limits import Limits, limits_of
from grpo_fast.trust.watch import Watch
from grpo_fast.typed import floats
from grpo_fast.watch import follow


def train(config: TrainConfig, inputs: Inputs, run: Run) -> int:
    """One whole run: build or load the models, evaluate, train, evaluate again, write model and report.

    Returns the exit code: 0, or 130 when it was interrupted, with everything saved.
    """
    use(config.policy.attention)
    task = load(config, inputs) if config.policy.model else prepare(config, inputs, run)
    policy = task.policy
    if inputs.functions:
        run.closing(inputs.functions).attend(run.path if run.world.is_first else None, run.progress.message)
    world = replace(run.world, generating=generating(config))
    engine = run.closing(
        engine_of(config, policy, run.path, decode=task.decode, tell=run.progress.message, world=world)
    )
    policy.activations_on_host = config.memory.activations_on_host
    needs_copy = loss_config(config).kl_coef != 0 and not policy.is_lora
    reference = policy.frozen_copy() if needs_copy else None
    for model in (policy, reference):
        if model is not None:
            model.shard(world, head_by_vocabulary=config.parallel.head == "vocabulary")
    optimizer = Optimizer(
        policy.trainable_parameters(),
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        betas=config.optim.betas,
        eps=config.optim.eps,
        max_grad_norm=config.optim.max_grad_norm,
        kind=config.optim.optimizer,
        where=config.memory.optimizer,
    )
    base_seed = config.seed << 32

    multipliers = Multipliers(
        task.scorer.names, task.scorer.weights, config.reward.floors, lr=config.reward.floor_lr
    )
    carried = {"multipliers": multipliers.state, "prompts": {}, "budget": {}, "data": {}}
    restored = restore(run.path, policy.model, optimizer, carried, world=run.world)
    check_data(carried["data"], training=task.prompts, heldout=task.heldout)
    first = restored.step
    budget = TokenBudget(
        config.optim.token_budget,
        tell=run.progress.message,
        state=carried["budget"],
        redo=run.world.size == 1,
    )
    queue = PromptQueue(len(task.prompts), config.seed, rest=config.rollout.rest, state=carried["prompts"])
    optimizer.offload()
    taken = run.world.first(
        lambda: [row for row in run.rows() if row["phase"] == "grpo" and row["step"] <= first]
    )
    watch = Watch(taken, weights=dict(zip(task.scorer.names, floats(task.scorer.weights), strict=True)))
    limits = Limits(limits_of(config), taken)
    dumps = Dumps(run.path, config, policy, tell=run.progress.message)
    run.begin("grpo", config.run.steps, done=first, objectives=task.scorer.names)
    for line in task.scorer.doubts():
        run.progress.message(f"warning: {line} on held-out replies (report of the reward model)")
    run.check_stop()
    before = saved_evaluation(run.path)
    if run.world.any(before is None) or before is None:
        with run.phase_timer("evaluate"):
            engine.push(policy.named_weights(), first)
            before = evaluate(task, engine, config, seed=base_seed)
        run.samples(sample_rows("before", 0, task, before, config.run.samples))
        run.world.first(lambda: save_evaluation(run.path, before))
        run.listen()
        run.check_stop()

    with (
        Pipeline(queue, task, engine, config, timer=run.phase_timer) as pipeline,
        Steps(
            run,
            config.run,
            policy.model,
            optimizer,
            steps=config.run.steps,
            first=first,
            carried=carried,
            ahead=pipeline,
            form=config.run.checkpoint,
        ) as steps,
    ):
        pipeline.take_up(restored.tensors, restored.plain)
        for step in steps:
            started = time.perf_counter()
            # a group of completions for each prompt, their rewards, and each one's advantage over its group
            rollout = pipeline.rollout(step, multipliers.weights(), ahead=goes_ahead(step + 1, config))
            lr = learning_rate(
                step,
                lr=config.optim.lr,
                warmup_steps=config.optim.warmup_steps,
                total_steps=config.run.steps,
                schedule=config.optim.schedule,
            )
            # push the policy towards what scored better, and hold it near the reference
            with run.phase_timer("update"):
                optimizer.reload()
                metrics = update(
                    policy,
                    optimizer,
                    rollout,
                    config,
                    lr=lr,
                    reference=reference,
                    budget=budget,
                    on_skip=partial(dumps.write, step + 1),
                )
                optimizer.offload()
            for line in policy.news():
                run.progress.message(line)
            metrics |= rollout_metrics(rollout, task.scorer.names, config.rollout.group_size)
            metrics |= pipeline.metrics
            metrics |= task.scorer.counts() | engine.counts()
            metrics |= multipliers.update(task.scorer.used(rollout.scored))
            for name, sign in (watch.step(metrics) | limits.step(metrics)).items():
                metrics[f"warning/{name}"] = 1.0
                run.progress.message(f"warning, step {step + 1}: {sign}")
            metrics |= limits.counts()
            metrics["tokens_per_s"] = metrics["generated_tokens"] / (time.perf_counter() - started)
            done = steps.taken(metrics)
            if is_due(done, config.run.eval_every) and done < config.run.steps:
                with run.phase_timer("evaluate"):
                    engine.push(policy.named_weights(), done)
                    evaluation = evaluate(task, engine, config, seed=base_seed)
                metrics |= means(evaluation)
                run.samples(sample_rows("step", done, task, evaluation, config.run.samples))
                run.progress.sample(task.heldout[0].plain, evaluation.completions[0])
            stops = limits.exceeded and done < config.run.steps
            steps.finish(last=stops)
            if run.stop_requested or stops:
                write_results(run, config, task, before, None, steps=done)
            run.check_stop()
            if stops:
                limits.check()

        with run.phase_timer("evaluate"):
            engine.push(policy.named_weights(), steps.done)
            after = evaluate(task, engine, config, seed=base_seed)
        run.samples(sample_rows("after", steps.done, task, after, config.run.samples))
        with run.phase_timer("save"):
            policy.save(run.path / "model", merge=config.policy.merge_on_save)
        write_results(run, config, task, before, after, steps=steps.done)
    run.progress.message(f"report: {run.path / 'report.html'}  model: {run.path / 'model'}")
    return 0


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit code 0 when done, 2 after bad input, 130 when interrupted."""
    run_command(lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
    asked = parse(argv, TRAIN)
    if asked.watch:
        return follow(asked.watch)
    prepare_libraries(asked.config.threads)
    with job(resolve_device(asked.config)) as (world, end):
        config = fitted(asked.config)
        select_device(config)
        inputs = check_inputs(
            config, own_heads=() if config.policy.model or config.reward.model else OBJECTIVES
        )
        if asked.dry_run:
            world.first(lambda: print_plan(config, inputs))
            return 0
        logger = opened(world, lambda: _logger(config, asked.resume))
        end.advice = f"go on with --resume {logger.path}"
        end.note = lambda line: note_ending(logger.path, UserError(line))
        return run_to_the_end(logger, TRAIN.module, lambda run: train(config, inputs, run), world=world)


def _logger(config: TrainConfig, resume: Path | None) -> RunLogger:
    wandb = "grpo_fast" if config.run.wandb else None
    if resume:
        return resumed_logger(
            resume,
            phase="grpo",
            longer="--run.steps",
            steps=config.run.steps,
            config_toml=to_toml(config),
            wandb_project=wandb,
        )
    return RunLogger.create(run_path(config), config_toml=to_toml(config), wandb_project=wandb)


if __name__ == "__main__":
    main()
