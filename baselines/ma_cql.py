"""MA-CQL: conservative Q-learning (Kumar et al. 2020) with deterministic policies, for every agent by itself.

This is the variant that OMAR (Pan et al. 2022) builds on and compares with, TD3's twin critics without its delay and
its target noise:

    cql_loss       TD error + cql_alpha (log sum_a~ exp(Q(o, a~) - log p(a~)) - Q(o, a))        (in shared.py)
    policy_loss    -Q1(o, pi(o)) + 0.001 pi(o)^2

    python baselines/ma_cql.py --scenario simple_spread --dataset expert
    python baselines/ma_cql.py --help

Settings are those published with OMAR; on HalfCheetah, where they take hours on a CPU, widths, learning rate, gamma and
updates are DOM2's and the conservative term has a third of the actions. The published ones are an option each:
`--updates 100000 --widths 256 256 --lr 3e-4 --gamma 0.95 --cql-actions 10 --cql-policy-actions 10`. The term is
estimated from a quarter of each minibatch in all environments (`--conservative-share 1`: from all of it).

OMAR's networks begin with batch normalisation, each call by its own batch. For observations that comes to
standardising them, as is done here. For actions it matters (BatchNormCritic): a shift or a scale common to all actions
of a call leaves Q as it is. Policies gain nothing from running to the border of the action box, where Q is least known,
but nothing teaches them offset and scale either. `--no-batch-norm` turns it off. On HalfCheetah
SETTINGS turn it off on all datasets except random.
Two more differences: that code subtracts the density of the noisy policy actions, CQL and this file the log-density;
and there the policy itself acts, here its moving average, the target policy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import (
    CQLBatch,
    act,
    cql_update,
    make_actor_critic,
    make_optimizers,
    options,
    sample_cql_batch,
    settings_table,
)
from dom2_mpe import train
from run import Algorithm, parse
from utils.program import program


@dataclass
class Args(shared.DataArgs, shared.CQLArgs, shared.CQLNetworkArgs, options.EvaluationArgs, options.RunArgs):
    """All options of MA-CQL."""


# As published with OMAR, except: on HalfCheetah what the docstring names, and batch normalisation is off there, except
# on random; random-medium and medium-expert, which were not published, have the settings of medium-replay and expert.
# The defaults of shared.py are those published for particles. cql_alpha was published for raw rewards.
SETTINGS = settings_table(
    particles=dict(raw_rewards=True),
    mujoco=dict(updates=6_000, batch_size=256, lr=1e-3, widths=(128, 128), gamma=0.99, rho=0.005, raw_rewards=True)
    | dict(cql_actions=4, cql_policy_actions=3),
    rows={
        "simple_spread": {
            "random": dict(updates=6_000, cql_alpha=0.5),
            "random-medium": dict(cql_alpha=1.0),
            "medium-replay": dict(cql_alpha=1.0),
            "medium": dict(cql_alpha=5.0),
            "medium-expert": dict(cql_alpha=5.0),
            "expert": dict(cql_alpha=5.0),
        },
        "simple_tag": {
            "random": dict(cql_alpha=0.5),
            "random-medium": dict(updates=1_000, cql_alpha=0.5),
            "medium-replay": dict(updates=1_000, cql_alpha=0.5),
            "medium": dict(cql_alpha=5.0),
            "medium-expert": dict(cql_alpha=5.0),
            "expert": dict(cql_alpha=5.0),
        },
        "simple_world": {
            "random": dict(updates=1_000, cql_alpha=0.5),
            "random-medium": dict(updates=1_000, cql_alpha=1.0),
            "medium-replay": dict(updates=1_000, cql_alpha=1.0),
            "medium": dict(updates=1_000, cql_alpha=0.5),
            "medium-expert": dict(updates=1_000, cql_alpha=5.0),
            "expert": dict(updates=1_000, cql_alpha=5.0),
        },
        "HalfCheetah": {
            "random": dict(cql_alpha=1.0),
            "random-medium": dict(cql_alpha=5.0, batch_norm=False),
            "medium-replay": dict(cql_alpha=5.0, batch_norm=False),
            "medium": dict(cql_alpha=1.0, batch_norm=False),
            "medium-expert": dict(cql_alpha=5.0, batch_norm=False),
            "expert": dict(cql_alpha=5.0, batch_norm=False),
        },
    },
)


def policy_loss(policy, critic, batch: CQLBatch, args: Args):
    """-E[Q1(o, pi(o))] + action_penalty E[pi(o)^2]: [L], and a dict of metrics [L]."""
    action = policy(batch.obs)
    q = critic.q1(batch.obs, action).mean(1)
    return args.action_penalty * policy.own_mean(action.square()) - q, {"charts/q_policy": q.detach()}


update = partial(cql_update, policy_loss=policy_loss)
MA_CQL = Algorithm("ma_cql", Args, SETTINGS, make_actor_critic, make_optimizers, sample_cql_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MA_CQL, __doc__), MA_CQL))
