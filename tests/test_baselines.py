"""The baselines: each loss against a naive version, each algorithm from end to end on tiny data, what they refuse."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import dom2_mamujoco
import dom2_mpe
import mamujoco_env
from baselines import ma_bc, ma_cql, ma_diffusion_ql, ma_sfbc, ma_td3bc, madiff, omar, shared
from baselines.ma_bc import MA_BC
from baselines.ma_cql import MA_CQL
from baselines.ma_diffusion_ql import MA_DIFFUSION_QL
from baselines.ma_sfbc import MA_SFBC
from baselines.ma_td3bc import MA_TD3BC
from baselines.madiff import MADIFF
from baselines.omar import OMAR
from common import DATASETS, Dataset
from dom2_mpe import NoiseSchedule, TwinCritic, augment, q_of_candidates, train
from particle_env import SCENARIOS, parallel_env
from run import parse
from utils.checkpoints import load_checkpoint
from utils.data import load_data
from utils.evaluation import NAMES
from utils.policies import TrainedPolicy
from utils.program import UserError

torch.set_num_threads(1)

BASELINES = {a.name: a for a in (MA_BC, MA_TD3BC, MA_CQL, OMAR, MA_SFBC, MADIFF, MA_DIFFUSION_QL)}
ALL_SCENARIOS = (*SCENARIOS, "HalfCheetah")
L, B, D, A = 2, 5, 4, 2  # learners, minibatch, observation and action entries

every_baseline = pytest.mark.parametrize("name", BASELINES)


def close(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options(algorithm, **changes):
    return algorithm.args("simple_spread", "medium", **{"batch_size": B} | changes)


def env_of(num_agents):
    """All that make_learners reads of an environment."""
    return SimpleNamespace(num_agents=num_agents, obs_size=D, action_size=A, device="cpu")


def dataset(columns, starts, lengths, episodes):
    """Dataset of the columns obs, action, reward, next_obs, done whose minibatches come from `episodes`."""
    returns = torch.stack([columns[2][:, s : s + n].sum(1).mean() for s, n in zip(starts, lengths, strict=True)])
    return Dataset(*columns, starts, lengths, returns, {}, {"all": len(starts)}).replicated(lambda _: episodes)


def networks(network, *sizes, seed=0):
    """A network in double precision whose output is not near zero."""
    torch.manual_seed(seed)
    net = network(*sizes).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def actors_and_critics():
    return [networks(shared.Policy, L, D, A, (7, 6), seed=s) for s in (1, 2)] + [
        networks(TwinCritic, L, D, A, (8, 5), seed=s) for s in (3, 4)
    ]


def transitions():
    """obs, action, reward, next_obs, done; the last transition of every minibatch ends in a terminal state."""
    done = torch.zeros(L, B, dtype=torch.float64)
    done[:, -1] = 1
    return normal(L, B, D), normal(L, B, A, seed=1).tanh(), normal(L, B, seed=2), normal(L, B, D, seed=3), done


def q_of(critic, obs, action, learner, twin):
    """Q of one learner's twin at one observation and action, out of the whole stack."""
    return critic(obs.expand(L, 1, -1), action.expand(L, 1, -1))[learner, twin, 0]


def action_of(policy, obs, learner):
    return policy(obs.expand(L, 1, -1))[learner, 0]


def gradients(loss, module):
    return torch.autograd.grad(loss.sum(), list(module.parameters()), retain_graph=True)


# ---- building blocks ----


def test_observation_norm_has_the_moments_of_everything_it_has_seen():
    norm = shared.ObservationNorm(L, D).double()
    batches = [3 * normal(L, B, D, seed=s) + torch.arange(L * D).view(L, 1, D) for s in range(4)]
    for batch in batches:
        norm.track(batch)
    seen = torch.cat(batches, 1)
    expected = (batches[0] - seen.mean(1, keepdim=True)) / (seen.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    close(norm(batches[0]), expected)


def test_standardise_takes_in_the_observations_and_applies_the_moments_to_both():
    norm, by_hand = (shared.ObservationNorm(L, D).double() for _ in range(2))
    for seed in range(2):
        batch = ma_td3bc.Batch(*transitions(), target_noise=None)._replace(obs=5 + normal(L, B, D, seed=seed))
        by_hand.track(batch.obs)
        found = norm.standardise(batch)
        expected = batch._replace(obs=by_hand(batch.obs), next_obs=by_hand(batch.next_obs))
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_policy_is_a_plain_mlp_per_learner():
    policy = networks(shared.Policy, L, D, A, (7, 6))
    obs = normal(L, B, D)
    for i in range(L):
        x = obs[i]
        for k, layer in enumerate(policy.layers):
            x = x @ layer.weight[i] + layer.bias[i]
            x = x.relu() if k < 2 else x.tanh()
        close(policy(obs)[i], x)


def test_policies_start_near_zero():
    torch.manual_seed(0)
    assert shared.Policy(L, D, A, (64, 64))(torch.randn(L, 100, D)).abs().max() < 0.2


# ---- losses against naive versions ----


def test_bc_loss():
    policy = networks(shared.Policy, L, D, A, (7,))
    obs, action, *_ = transitions()
    for i in range(L):
        errors = [(action_of(policy, obs[i, b], i)[k] - action[i, b, k]) ** 2 for b in range(B) for k in range(A)]
        close(ma_bc.bc_loss(policy, ma_bc.Batch(obs, action))[i], sum(errors) / len(errors))


def test_td3bc_critic_loss():
    _, target_policy, critic, target_critic = actors_and_critics()
    batch = ma_td3bc.Batch(*transitions(), target_noise=3 * normal(L, B, A, seed=5))
    loss = ma_td3bc.critic_loss(critic, target_critic, target_policy, batch, 0.9, noise=0.4, clip=0.5)
    for i in range(L):
        expected = 0
        for b in range(B):
            shift = torch.stack([(0.4 * e).clip(-0.5, 0.5) for e in batch.target_noise[i, b]])
            action = (action_of(target_policy, batch.next_obs[i, b], i) + shift).clamp(-1, 1)
            next_q = min(q_of(target_critic, batch.next_obs[i, b], action, i, twin) for twin in (0, 1))
            target = batch.reward[i, b] + (0.9 * next_q if b < B - 1 else 0)
            for twin in (0, 1):
                expected += (target - q_of(critic, batch.obs[i, b], batch.action[i, b], i, twin)) ** 2 / B
        close(loss[i], expected)


def test_td3bc_policy_loss_and_its_gradient():
    policy, _, critic, _ = actors_and_critics()
    batch = ma_td3bc.Batch(*transitions(), target_noise=None)
    loss, _ = ma_td3bc.policy_loss(policy, critic, batch, alpha=1.7)
    expected = []
    for i in range(L):
        actions = [action_of(policy, batch.obs[i, b], i) for b in range(B)]
        q = torch.stack([q_of(critic, batch.obs[i, b], actions[b], i, 0) for b in range(B)])
        weight = 1.7 / (sum(abs(x.item()) for x in q) / B)  # a number: no gradient
        expected.append(-weight * q.mean() + (torch.stack(actions) - batch.action[i]).square().mean())
    expected = torch.stack(expected)
    close(loss, expected)
    for actual, naive in zip(gradients(loss, policy), gradients(expected, policy), strict=True):
        close(actual, naive)


def cql_batch(policy_actions, part=B):
    uniform = normal(L, B, 3, A, seed=6).tanh()[:, :part]
    return shared.CQLBatch(*transitions(), uniform, normal(2, L, B, policy_actions, A, seed=7)[:, :, :part])


@pytest.mark.parametrize("policy_actions, part", [(0, B), (2, B), (2, B - 1), (0, 1)])
def test_cql_critic_loss(policy_actions, part):
    policy, target_policy, critic, target_critic = actors_and_critics()
    args = options(MA_CQL, cql_alpha=1.5, cql_noise=0.3, cql_policy_actions=policy_actions, gamma=0.9)
    batch = cql_batch(policy_actions, part)
    loss, metrics = shared.cql_loss(critic, target_critic, policy, target_policy, batch, args)
    uniform, gaussian = torch.distributions.Uniform(-1.0, 1.0), torch.distributions.Normal(0.0, 0.3)
    for i in range(L):
        td = conservative = 0
        for b in range(B):
            obs, next_obs = batch.obs[i, b], batch.next_obs[i, b]
            action = action_of(target_policy, next_obs, i)
            next_q = min(q_of(target_critic, next_obs, action, i, twin) for twin in (0, 1))
            target = batch.reward[i, b] + (0.9 * next_q if b < B - 1 else 0)
            sampled = []
            if b < part:
                sampled = [(a, uniform.log_prob(a * 0.999).sum()) for a in batch.random_actions[i, b]]
                for centre, noises in zip((obs, next_obs), batch.policy_noise[:, i, b], strict=True):
                    for noise in 0.3 * noises:
                        sampled.append(
                            ((action_of(policy, centre, i) + noise).clamp(-1, 1), gaussian.log_prob(noise).sum())
                        )
            for twin in (0, 1):
                q = q_of(critic, obs, batch.action[i, b], i, twin)
                td += (target - q).item() ** 2 / B
                if b < part:
                    total = sum(math.exp((q_of(critic, obs, a, i, twin) - density).item()) for a, density in sampled)
                    conservative += (math.log(total) - q.item()) / part
        close(loss[i].item(), td + 1.5 * conservative, 1e-7)
        close(metrics["losses/td"][i], td, 1e-7)
        close(metrics["losses/conservative"][i], conservative, 1e-7)


@pytest.mark.parametrize("algorithm", (MA_TD3BC, MA_CQL, OMAR))
def test_layer_normalisation_of_the_critics_is_an_option(algorithm):
    """With it, Q does not change with the scale of a hidden layer's weights and biases."""
    torch.manual_seed(0)
    for norm in (False, True):
        learners = algorithm.make_learners(options(algorithm, critic_norm=norm), env_of(L))
        obs, action = torch.randn(L, B, D), torch.randn(L, B, A)
        for name in ("critic", "target_critic"):
            critic = learners[name]
            q = critic(obs, action)
            with torch.no_grad():
                critic.layers[0].weight.mul_(100)
                critic.layers[0].bias.mul_(100)
            assert torch.allclose(critic(obs, action), q, rtol=0.02, atol=0.02) == norm


def test_batch_norm_critic_sees_standardised_actions():
    critic = networks(shared.BatchNormCritic, L, D, A, (8, 5))
    obs, actions = normal(L, B, D), normal(L, B, 3, A, seed=1)
    standard = torch.empty_like(actions)
    for i in range(L):
        rows = actions[i].view(B * 3, A)
        standard[i] = (actions[i] - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    plain = TwinCritic(L, D, A, (8, 5)).double()
    plain.load_state_dict(critic.state_dict())
    for of_critic, of_plain in ((critic, plain), (critic.q1, plain.q1)):
        q = q_of_candidates(of_critic, obs, actions)
        close(q, q_of_candidates(of_plain, obs, standard))
        close(q_of_candidates(of_critic, obs, 0.5 * actions + 3), q, 1e-4)
    for batch_norm, network in ((True, shared.BatchNormCritic), (False, TwinCritic)):
        for algorithm in (MA_CQL, OMAR):
            learners = algorithm.make_learners(options(algorithm, batch_norm=batch_norm), env_of(L))
            assert type(learners["critic"]) is type(learners["target_critic"]) is network
    learners = MA_TD3BC.make_learners(options(MA_TD3BC), env_of(L))
    assert type(learners["critic"]) is type(learners["target_critic"]) is TwinCritic


def test_cql_policy_loss():
    policy, _, critic, _ = actors_and_critics()
    loss, _ = ma_cql.policy_loss(policy, critic, cql_batch(0), options(MA_CQL, action_penalty=0.4))
    obs = transitions()[0]
    for i in range(L):
        actions = [action_of(policy, obs[i, b], i) for b in range(B)]
        q = [q_of(critic, obs[i, b], actions[b], i, 0) for b in range(B)]
        close(loss[i], 0.4 * sum(a.square().mean() for a in actions) / B - sum(q) / B)


def test_omar_policy_loss():
    policy, _, critic, _ = actors_and_critics()
    args = options(OMAR, omar_coe=0.6, action_penalty=0.4, omar_sigma=0.7)
    batch = omar.Batch(*cql_batch(0), sampler_noise=normal(3, L, B, 4, A, seed=8))
    loss, _ = omar.policy_loss(policy, critic, batch, args)
    own = 0
    for i in range(L):
        expected = 0
        for b in range(B):
            obs, action = batch.obs[i, b], action_of(policy, batch.obs[i, b], i)
            mu, sigma = torch.zeros(A), 0.7
            for noise in batch.sampler_noise[:, i, b]:
                samples = [(mu + sigma * eps).clamp(-1, 1) for eps in noise]
                q = [q_of(critic, obs, a, i, 0).item() for a in samples]
                weights = [math.exp(x - max(q)) for x in q]
                mu = sum(w * a for w, a in zip(weights, samples, strict=True)) / sum(weights)
                sigma = (sum((a - mu) ** 2 for a in samples) / len(samples)).sqrt()
            policy_q = q_of(critic, obs, action, i, 0)
            best = samples[q.index(max(q))] if max(q) > policy_q else action
            own += best is action
            expected += (0.6 * (action - best).square().mean() - 0.4 * policy_q + 0.4 * action.square().mean()) / B
        close(loss[i], expected)
    assert 0 < own < L * B  # both cases occurred


def test_sfbc_value():
    q = normal(3, 4)
    for alpha in (0.0, 2.0):
        for row, value in zip(q, ma_sfbc.value(q, alpha), strict=True):
            weights = [math.exp(alpha * x) for x in row]
            close(value, sum(w * x for w, x in zip(weights, row, strict=True)) / sum(weights))
    close(ma_sfbc.value(q, 1e6), q.amax(-1))


def test_sfbc_planning():
    reward, value = normal(6, 4, seed=1), normal(6, 4, seed=2)
    lengths = (4, 4, 4, 3, 2, 1)
    real = torch.tensor([[t < n for t in range(4)] for n in lengths], dtype=torch.float64)
    planned = ma_sfbc.planning(reward, value, real, 0.8)
    for w, n in enumerate(lengths):
        later = -math.inf
        for t in reversed(range(n)):
            later = reward[w, t] + 0.8 * max(later, value[w, t])
            close(planned[w, t], later)


def test_sfbc_critic_loss():
    args = options(MA_SFBC, widths=(8,), critic_widths=(7, 6), batch_size=6, window=3)
    torch.manual_seed(0)
    learners = ma_sfbc.make_learners(args, env_of(L)).double()
    critic, policy = learners["critic"], learners["policy"]
    target_critic = networks(ma_sfbc.Critic, L, D, A, (7, 6))
    obs, next_obs, action = normal(L, 9, D), normal(L, 9, D, seed=1), normal(L, 9, A, seed=2).tanh()
    real = torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 1, 1]] * L).double()  # one ends with its episode, one begins with it
    done = torch.tensor([[0.0, 0, 0, 0, 1, 0, 0, 0, 0]] * L).double()
    reward, noise = normal(L, 9, seed=3), normal(L, 9, 5, A, seed=4)
    windows = ma_sfbc.Windows(obs, action, reward, next_obs, done, real, noise)
    loss, _ = ma_sfbc.critic_loss(critic, target_critic, policy, windows, 3, 0.9, 2.0)
    candidates = torch.stack([policy(next_obs, noise[:, :, k]) for k in range(5)], 2)
    q = torch.stack([target_critic(next_obs, candidates[:, :, k]) for k in range(5)], -1)
    value = (1 - done) * (torch.softmax(2.0 * q, -1) * q).sum(-1)
    for i in range(L):
        errors = []
        for steps in ((0, 1, 2), (3, 4), (7, 8)):
            later = -math.inf
            for t in reversed(steps):
                later = reward[i, t] + 0.9 * max(later, value[i, t])
                errors.append((critic(obs, action)[i, t] - later) ** 2)
        close(loss[i], sum(errors) / 7)


def test_sfbc_critic_is_a_plain_mlp():
    critic = networks(ma_sfbc.Critic, L, D, A, (7, 6))
    obs, action = normal(L, B, D), normal(L, B, A, seed=1)
    for i in range(L):
        x = torch.cat([obs[i], action[i]], -1)
        for j, layer in enumerate(critic.layers):
            x = x @ layer.weight[i] + layer.bias[i]
            x = F.silu(x) if j < 2 else x
        close(critic(obs, action)[i], x[:, 0])


def test_sfbc_candidates_are_the_policy_s_actions_for_their_own_noise():
    args = options(MA_SFBC, widths=(8,), window=5)
    policy = ma_sfbc.make_learners(args, env_of(L))["policy"].double()
    obs, noise = normal(L, B, D), normal(L, B, 3, A, seed=1)
    found = ma_sfbc.candidates(policy, obs, noise)
    for k in range(3):
        close(found[:, :, k], policy(obs, noise[:, :, k]))


def denoiser(num_seeds=2, num_agents=3, width=8, blocks=2):
    return networks(madiff.Denoiser, num_seeds * num_agents, num_agents, D, width, blocks)


def egos():
    """[6, B]: in every column one of the three agents of each of two teams."""
    return F.one_hot(torch.arange(B) % 3, 3).T.repeat(2, 1).double()


def first_step(ego, horizon):
    """Mask of the ego agents' first observations, [L, B, H, 1]."""
    known = torch.zeros(*ego.shape, horizon, 1).double()
    known[:, :, 0, 0] = ego
    return known


def test_madiff_block_convolves_over_time():
    """Against PyTorch's own convolution, without attention: x + silu(conv(x)), zeros beyond the window's ends."""
    L, M, H, C, kernel = 2, 3, 6, 4, 5
    block = madiff.Block(L, 1, C, kernel).double()
    with torch.no_grad():
        for layer in (block.condition, block.attended, block.out):
            layer.weight.zero_()
            layer.bias.zero_()
        block.out.weight.copy_(torch.eye(C).expand(L, C, C))
    x = normal(L, M, H, C, seed=1)
    found = block(x, normal(L, M, C, seed=2))
    for i in range(L):
        weight = block.convolution.weight[i].view(kernel, C, C).permute(2, 1, 0)  # [out, in, kernel]
        h = torch.conv1d(x[i].mT, weight, block.convolution.bias[i, 0], padding="same").mT
        close(found[i], x[i] + F.silu(h))


def test_madiff_trajectory_loss():
    net, schedule, M, H = denoiser(), NoiseSchedule(), 6, 4
    ego = egos()
    tau = normal(M, B).sigmoid()
    batch = madiff.Batch(
        obs=normal(M, B, H, D, seed=1), action=None, next_obs=None, rank=normal(M, B, seed=2).sigmoid(),
        guided=(normal(M, B, seed=3) > 0).double(), known=first_step(ego, H), tau=tau, eps=normal(M, B, H, D, seed=4),
    )  # fmt: skip
    x = torch.zeros_like(batch.obs)
    known = torch.zeros(M, B, H, 1).double()
    for i in range(M):
        for b in range(B):
            for h in range(H):
                known[i, b, h] = is_known = float(h == 0 and ego[i, b] == 1)
                alpha, sigma = schedule.alpha(tau[i, b]), schedule.sigma(tau[i, b])
                noisy = alpha * batch.obs[i, b, h] + sigma * batch.eps[i, b, h]
                x[i, b, h] = batch.obs[i, b, h] if is_known else noisy
    predicted = net(x, known, batch.rank, batch.guided, tau)
    loss = madiff.trajectory_loss(net, schedule, batch)
    for i in range(M):
        errors = [
            ((predicted - batch.obs)[i, b, h] ** 2).sum() * (1 - known[i, b, h, 0]) for b in range(B) for h in range(H)
        ]
        close(loss[i], sum(errors) / (B * H * D))


def test_madiff_inverse_loss():
    inverse = networks(shared.Policy, L, 2 * D, A, (7,))
    obs, action, _, next_obs, _ = transitions()
    windows = torch.stack([obs, normal(L, B, D, seed=9)], 2)
    batch = madiff.Batch(windows, action, next_obs, *[None] * 5)
    for i in range(L):
        errors = [
            (action_of(inverse, torch.cat([obs[i, b], next_obs[i, b]]), i) - action[i, b]).square().mean()
            for b in range(B)
        ]
        close(madiff.inverse_loss(inverse, batch)[i], sum(errors) / B)


# ---- OMAR's sampler ----


def quadratic(optimum, steepness):
    return lambda a: -steepness * (a - optimum[:, :, None]).square().sum(-1)


@pytest.mark.parametrize("elites", [0, 5])
def test_omar_sampler_finds_the_maximum_of_a_known_q(elites):
    optimum = 0.9 * normal(L, 50, A).tanh()  # its own for every learner and observation
    noise = normal(4, L, 50, 100, A, seed=1)
    found, q = omar.zeroth_order(quadratic(optimum, 30.0), noise, 2.0, elites)
    distance = (found - optimum).norm(dim=-1)
    close(q, -30.0 * distance.square())
    assert distance.mean() < 0.15 and (elites == 0 or distance.median() < 0.01)
    guess = omar.zeroth_order(quadratic(optimum, 0.0), noise, 2.0, elites)[0]
    assert (guess - optimum).norm(dim=-1).mean() > 0.5  # where Q says nothing nothing is found


def test_omar_sampler_escapes_a_local_maximum():
    def q(a):  # a wide hill at -0.7 and a higher one at 0.6
        return 5 * torch.exp(-4 * (a[..., 0] + 0.7) ** 2) + 8 * torch.exp(-20 * (a[..., 0] - 0.6) ** 2)

    found, _ = omar.zeroth_order(q, normal(3, 1, 200, 40, 1), 2.0)
    assert ((found - 0.6).abs() < 0.3).double().mean() > 0.9


def test_omar_elites_keep_the_q_with_which_they_were_chosen():
    """With batch normalisation Q depends on all actions of a call, as here. OMAR's loop, for every observation."""
    noise, found = normal(3, L, B, 6, A, seed=2), []

    def q_fn(a):
        return (3 * a).sin().sum(-1) + a.square().sum((-2, -1))[..., None]

    for i, b in product(range(L), range(B)):
        mu, sigma, kept = torch.zeros(A), torch.tensor(1.0), []
        for eps in noise[:, i, b]:
            new = (mu + sigma * eps).clamp(-1, 1)
            pool = [*zip(q_fn(new[None, None])[0, 0], new, strict=True), *kept]
            kept = sorted(pool, key=lambda pair: -pair[0])[:2]
            elites = torch.stack([action for _, action in kept])
            mu, sigma = elites.mean(0), elites.std(0)
        found.append(kept[0])
    actions, q = omar.zeroth_order(q_fn, noise, 1.0, 2)
    close(q.flatten(), torch.stack([q for q, _ in found]))
    close(actions.flatten(0, 1), torch.stack([action for _, action in found]))


def test_omar_elites_stay_among_the_samples():
    """With noise of one iteration only, nothing better can be found later: the first one's best is kept."""
    optimum = normal(L, B, A).tanh()
    noise = normal(3, L, B, 6, A, seed=2)
    noise[1:] = 50.0  # far outside: clipped to a corner
    first = noise[0].clamp(-1, 1)
    best = quadratic(optimum, 1.0)(first).amax(-1)
    corner = quadratic(optimum, 1.0)(torch.ones(L, B, 1, A).double())[..., 0]
    _, q = omar.zeroth_order(quadratic(optimum, 1.0), noise, 1.0, 2)
    close(q, torch.maximum(best, corner))


# ---- SfBC's choice ----


def test_sfbc_chooses_with_probability_softmax_of_q():
    q = torch.tensor([[0.0, 0.5, 1.0]]).expand(20_000, 3)
    actions = torch.eye(3).expand(20_000, 3, 3)
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.0, 2.0):
        share = ma_sfbc.choose(q, actions, alpha, generator=generator).mean(0)
        close(share, torch.softmax(alpha * q[0], -1), 0.02)


def test_sfbc_averages_different_candidates():
    """Two of three, the second drawn by softmax(alpha Q) among those that are left; also where Q leaves only one."""
    q, generator = torch.tensor([[0.0, 0.5, 1.0]]).expand(20_000, 3), torch.Generator().manual_seed(0)
    p = torch.softmax(2.0 * q[0], -1)
    chosen = ma_sfbc.choose(q, torch.eye(3).expand(20_000, 3, 3), 2.0, 2, generator)
    assert (chosen == 0.5).sum(-1).eq(2).all()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    left_out = [sum(p[i] * p[j] / (1 - p[i]) for i, j in pairs if k not in (i, j)) for k in range(3)]
    close((chosen == 0).float().mean(0), torch.stack(left_out), 0.02)
    assert (ma_sfbc.choose(q, torch.eye(3).expand(20_000, 3, 3), 1e6, 2, generator)[:, 2] == 0.5).all()


def two_modes(num_episodes=200, steps=4):
    """Trajectories of 2 agents whose actions are -0.6 or 0.6; agent 0 is paid for the one, agent 1 for the other."""
    generator = torch.Generator().manual_seed(0)
    n, T = 2, num_episodes * steps
    mode = 0.6 * torch.randn(n, T, generator=generator).sign()
    obs = torch.randn(n, T, D, generator=generator)
    action = mode[..., None] + 0.05 * torch.randn(n, T, A, generator=generator)
    starts = torch.arange(num_episodes) * steps
    columns = obs, action, mode * torch.tensor([[1.0], [-1.0]]), obs, torch.zeros(n, T)
    return dataset(columns, starts, torch.full_like(starts, steps), torch.arange(num_episodes))


def test_sfbc_prefers_the_better_of_two_modes():
    torch.manual_seed(0)
    data = two_modes()
    args = options(
        MA_SFBC, widths=(64, 64), critic_widths=(32,), batch_size=128, window=4, plan_candidates=2, gamma=0.5,
        actor_lr=5e-3, critic_lr=5e-3, rho=0.05, diffusion_steps=10, eval_candidates=32, eval_alpha=100.0,
    )  # fmt: skip
    learners = ma_sfbc.make_learners(args, env_of(2))
    optimizers = ma_sfbc.make_optimizers(args, learners)
    for _ in range(400):
        ma_sfbc.update(learners, optimizers, ma_sfbc.sample_batch(data, args), args)
    obs, generator = torch.randn(2, 200, D), torch.Generator().manual_seed(0)
    either = ma_sfbc.act(learners, obs, replace(args, eval_alpha=0.0), generator)[..., 0]
    better = ma_sfbc.act(learners, obs, args, generator)[..., 0]
    assert 0.25 < (either > 0).float().mean() < 0.75  # the behaviour has both
    assert ((either.abs() - 0.6).abs() < 0.3).float().mean() > 0.8
    assert (better[0] > 0.3).float().mean() > 0.95 and (better[1] < -0.3).float().mean() > 0.95


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_sfbc_acts_from_noise_of_the_given_temperature(temperature):
    args = options(MA_SFBC, temperature=temperature, **SMALL["ma_sfbc"] | {"eval_candidates": 6})
    learners, obs = ma_sfbc.make_learners(args, env_of(2)), torch.randn(2, 3, D)
    torch.nn.init.zeros_(learners["policy"].net.layers[-1].weight)  # the target policy is another one, and it acts
    seen = []
    learners["critic"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].view(2, 3, 6, A)))
    ma_sfbc.act(learners, obs, args, torch.Generator().manual_seed(3))
    noise = torch.randn(2, 3, 6, A, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(seen[0], ma_sfbc.candidates(learners["target_policy"], obs, temperature * noise))


# ---- MADiff's plans ----


def test_madiff_plans_start_at_the_given_observation():
    net, M, H = denoiser(), 6, 5
    first, ego = 10 + normal(M, B, D), egos()
    args = options(MADIFF, diffusion_steps=4, beta_max=10.0)
    plans = madiff.plan(net, first, first_step(ego, H), normal(M, B, H, D, seed=1), args)
    assert plans.shape == (M, B, H, D) and plans.isfinite().all()
    assert torch.equal(plans[:, :, 0][ego == 1], first[ego == 1])
    assert (plans[:, :, 0][ego == 0] != first[ego == 0]).all()
    assert (plans[:, :, 1] != first).all()


def test_madiff_plans_what_the_network_predicts():
    """One whose prediction is a fixed trajectory plans that one, guided by the return as far as asked."""
    M, H = 6, 5
    trajectory, better = normal(M, B, H, D), normal(M, B, H, D, seed=1)

    def net(x, known, rank, guided, t):
        return torch.lerp(trajectory, better, (guided * rank)[:, :, None, None])

    first, known = normal(M, B, D, seed=2), torch.zeros(M, B, H, 1).double()
    for guidance in (0.0, 1.0, 1.2):
        args = options(MADIFF, target_return=0.5, guidance=guidance, diffusion_steps=5, beta_max=20.0)
        plans = madiff.plan(net, first, known, normal(M, B, H, D, seed=3), args)
        close(plans, trajectory + guidance * 0.5 * (better - trajectory), 0.05)


def test_madiff_agents_attend_to_their_own_team_alone():
    net, H = denoiser(), 4
    x, known, rank, guided = normal(6, B, H, D), torch.zeros(6, B, H, 1).double(), normal(6, B), normal(6, B, seed=1)
    with torch.no_grad():
        before = net(x, known, rank, guided, 0.5)
        x[1] += 1  # the second agent of the first seed
        changed = (net(x, known, rank, guided, 0.5) - before).abs().amax((1, 2, 3)) > 1e-9
    assert changed.tolist() == [True, True, True, False, False, False]


def test_madiff_acts_on_its_own_observation_alone():
    args = options(MADIFF, num_seeds=2, width=8, num_blocks=2, horizon=4, inverse_widths=(16,))
    torch.manual_seed(0)
    learners = madiff.make_learners(args, env_of(3))
    for p in learners.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    obs = torch.randn(6, B, D)

    def act():
        return madiff.act(learners, obs, args, torch.Generator().manual_seed(1))

    args.temperature = 0.0  # one plan for an observation, whatever the noise
    assert torch.equal(act(), madiff.act(learners, obs, args, torch.Generator().manual_seed(2)))
    args.temperature = 1.0
    before = act()
    assert before.shape == (6, B, A)
    assert not torch.equal(before, madiff.act(learners, obs, args, torch.Generator().manual_seed(2)))
    obs[1, 2] += 1
    changed = ((act() - before).abs() > 1e-6).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]


def ramp(lengths=(5, 3, 9), num_agents=2):
    """Trajectories whose observations count the rows, and whose next observation follows; the last is there twice."""
    count = torch.arange(sum(lengths), dtype=torch.float32).expand(num_agents, -1)
    obs = (count + 1000 * torch.arange(num_agents)[:, None])[..., None].expand(-1, -1, D)
    action = torch.stack([count, torch.zeros_like(count)], -1)
    columns = obs, action, count**2, obs + 0.5, torch.zeros_like(count)  # + 0.5 also where the trajectory ends
    lengths = torch.tensor(lengths)
    return dataset(columns, lengths.cumsum(0) - lengths, lengths, torch.tensor([0, 1, 2, 2]))


def test_madiff_windows():
    data, H, M = ramp(), 4, 3_000
    torch.manual_seed(0)
    batch = madiff.sample_batch(data, options(MADIFF, num_seeds=2, batch_size=M, horizon=H, return_dropout=0.25))
    obs = batch.obs[..., 0].view(2, 2, M, H)
    assert torch.equal(obs[:, 0] + 1000, obs[:, 1]) and not torch.equal(obs[0], obs[1])  # a team's are the same
    ends = (data.starts + data.lengths).tolist()
    counts = torch.zeros(3)
    means = torch.zeros(2, M)
    for s in range(2):
        for b in range(M):
            start = int(obs[s, 0, b, 0])
            end = min(e for e in ends if e > start)
            expected = [start + h if start + h < end else end - 0.5 for h in range(H)]
            assert obs[s, 0, b].tolist() == expected
            means[s, b] = sum(t**2 for t in range(start, min(start + H, end))) / (min(start + H, end) - start)
            counts[ends.index(end)] += 1
    close(counts / counts.sum(), torch.tensor([0.25, 0.25, 0.5]), 0.03)
    start = batch.obs[:, :, 0]
    assert torch.equal(batch.next_obs, start + 0.5) and torch.equal(batch.action[:, :, 0], start[..., 0] % 1000)
    rank = batch.rank.view(2, 2, M)
    for s in range(2):
        order = rank[s, 0].argsort()
        assert (means[s, order].diff() >= 0).all()
        close(rank[s, 0, order], torch.linspace(0, 1, M), 1e-6)
    ego = batch.known[:, :, 0, 0]
    assert torch.equal(batch.known, first_step(ego, H).float())
    assert torch.equal(ego.view(2, 2, M).sum(1), torch.ones(2, M))
    assert 0.45 < ego.mean() < 0.55 and 0.72 < batch.guided.mean() < 0.78
    assert torch.equal(batch.guided.view(2, 2, M)[:, 0], batch.guided.view(2, 2, M)[:, 1])


def test_sfbc_windows():
    data, H = ramp(), 4
    torch.manual_seed(0)
    args = options(MA_SFBC, num_seeds=2, batch_size=500, plan_windows=4_000, window=H)
    batch = ma_sfbc.sample_batch(data, args)
    windows = batch.windows
    obs = windows.obs[..., 0].view(4, 4_000, H)
    assert (obs[[0, 2]] < 1000).all() and (obs[[1, 3]] >= 1000).all()  # each agent's own
    # the first trajectory has the rows 0 to 4, the second 5 to 7, fewer than a window, the third 8 to 16
    expected, found = {(0, range(-3, 5)), (5, range(5, 6)), (8, range(5, 17))}, set()
    for window, real in zip((obs % 1000).flatten(0, 1).tolist(), windows.real.view(-1, H).tolist(), strict=True):
        start, end = next((s, s + n) for s, n in zip(data.starts, data.lengths, strict=True) if window[0] < s + n)
        rows = [row for row, is_real in zip(window, real, strict=True) if is_real]
        first = rows[0] - real.index(1)
        assert window == [min(max(first + h, start), end - 1) for h in range(H)]
        assert real == [start <= first + h < end for h in range(H)]
        found.add((int(start), first))
    counts = torch.zeros(17)
    counts.index_add_(0, (obs % 1000).flatten().long(), windows.real.flatten())
    for rows in (range(5), range(5, 8), range(8, 17)):  # every step of a trajectory as often
        share = counts[list(rows)] / counts[list(rows)].sum()
        close(share, torch.full((len(rows),), 1 / len(rows)), 0.015)
    assert found == {(start, first) for start, firsts in expected for first in firsts}
    assert torch.equal(windows.next_obs, windows.obs + 0.5)
    assert windows.noise.shape == (4, 4_000 * H, args.plan_candidates, A)
    assert batch.obs.shape == (4, 500, D) and (batch.obs[..., 0] % 1000).unique().tolist() == list(range(17))
    close(batch.action[..., 0], batch.obs[..., 0] % 1000)


# ---- updates ----


SMALL = {
    "ma_bc": {"widths": (8,)},
    "ma_td3bc": {"widths": (8,)},
    "ma_cql": {"widths": (8,), "cql_policy_actions": 2},
    "omar": {"widths": (8,), "omar_coe": 0.5},
    "ma_sfbc": {
        **{"widths": (8,), "critic_widths": (8,), "window": 5, "plan_candidates": 3, "eval_candidates": 4},
        "diffusion_steps": 2,
    },
    "madiff": {"width": 4, "num_blocks": 1, "inverse_widths": (8,), "horizon": 2, "diffusion_steps": 1},
    "ma_diffusion_ql": {"widths": (8,), "critic_widths": (8,), "diffusion_steps": 2, "eval_candidates": 2},
}


def random_data(num_agents, episodes=8, steps=5):
    generator, T = torch.Generator().manual_seed(0), episodes * steps

    def normal(*shape):
        return torch.randn(num_agents, T, *shape, generator=generator)

    columns = normal(D), normal(A).tanh(), normal(), normal(D), torch.zeros(num_agents, T)
    starts = torch.arange(episodes) * steps
    return dataset(columns, starts, torch.full_like(starts, steps), torch.arange(episodes))


def trained(name, data, updates=3):
    """Two seeds of three agents after some updates."""
    algorithm = BASELINES[name]
    args = options(algorithm, num_seeds=2, **{"batch_size": 10} | SMALL[name])
    torch.manual_seed(0)
    learners = algorithm.make_learners(args, env_of(3))
    optimizers = algorithm.make_optimizers(args, learners)
    for _ in range(updates):
        metrics = algorithm.update(learners, optimizers, algorithm.sample_batch(data, args), args)
    return args, learners, metrics


@every_baseline
def test_an_update_changes_every_network_and_logs_numbers_of_all_learners(name):
    data = random_data(3)
    _, before, _ = trained(name, data, updates=1)
    args, after, metrics = trained(name, data, updates=4)
    for (key, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), key
    assert all(value.shape == (6,) and value.isfinite().all() and not value.requires_grad for value in metrics.values())
    actions = BASELINES[name].act(after, torch.randn(6, 7, D), args, torch.Generator().manual_seed(0))
    assert actions.shape == (6, 7, A) and actions.abs().max() <= 1 and not actions.requires_grad


@every_baseline
def test_learners_do_not_see_each_other(name):
    """Another reward and other actions of agent 1 change that agent alone; in MADiff, its team."""
    data = random_data(3)
    _, before, _ = trained(name, data)
    data.action[1] *= -0.5
    data.reward[1] *= -0.5
    _, after, _ = trained(name, data)
    changed = torch.zeros(6, dtype=torch.bool)
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        changed |= (old != new).unflatten(0, (6, -1)).flatten(1).any(1)
    assert changed.tolist() == [True] * 6 if name == "madiff" else [False, True, False] * 2


@pytest.mark.parametrize("name", ["ma_td3bc", "ma_cql", "omar"])
def test_update_steps_critics_then_policies_then_targets(name):
    """Replayed by hand, with an Adam per network and gradients clipped learner by learner."""
    algorithm = BASELINES[name]
    args = options(algorithm, batch_size=10, lr=0.01, rho=0.2, max_grad_norm=0.05, **SMALL[name])
    torch.manual_seed(0)
    learners = algorithm.make_learners(args, env_of(L))
    batches = algorithm.sample_batch(random_data(L), args)
    expected, norm = copy.deepcopy(learners), shared.ObservationNorm(L, D)
    adams = {k: torch.optim.Adam(expected[k].parameters(), 0.01) for k in ("policy", "critic")}

    def step(key, loss):
        adams[key].zero_grad()
        loss.sum().backward()
        for i in range(L):
            parts = [p.grad.unflatten(0, (L, -1))[i] for p in expected[key].parameters()]
            length = torch.cat([g.flatten() for g in parts]).norm()
            assert length > 0.05 or key == "policy"
            for g in parts:
                g.mul_(min(1.0, 0.05 / length.item()))
        adams[key].step()

    policy, critic = expected["policy"], expected["critic"]
    assert name != "ma_td3bc" or len(batches) == 2
    for batch in batches if name == "ma_td3bc" else [batches]:
        norm.track(batch.obs)
        batch = batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))
        targets = expected["target_critic"], expected["target_policy"]
        if name == "ma_td3bc":
            step("critic", ma_td3bc.critic_loss(critic, *targets, batch, args.gamma, 0.2, 0.5))
        else:
            step("critic", shared.cql_loss(critic, targets[0], policy, targets[1], batch, args)[0])
    policy_loss = {"ma_td3bc": ma_td3bc, "ma_cql": ma_cql, "omar": omar}[name].policy_loss
    step("policy", policy_loss(policy, critic, batch, args.alpha if name == "ma_td3bc" else args)[0])
    for key in ("policy", "critic"):
        for target, source in zip(expected[f"target_{key}"].parameters(), expected[key].parameters(), strict=True):
            target.data = 0.8 * target.data + 0.2 * source.data

    algorithm.update(learners, algorithm.make_optimizers(args, learners), batches, args)
    for (key, actual), value in zip(learners.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5, msg=key)


def test_omar_with_all_weight_on_the_sampler_moves_towards_its_action():
    """A critic that peaks at a known action: after training, the policy is there."""
    args = options(OMAR, omar_coe=1.0, action_penalty=0.0, omar_samples=30, lr=0.01)
    policy = networks(shared.Policy, 1, D, A, (16,)).float()
    peak = torch.tensor([0.5, -0.4])

    critic = SimpleNamespace(q1=lambda obs, action: -20 * (action - peak).square().sum(-1))
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    torch.manual_seed(0)
    for _ in range(150):
        batch = omar.Batch(torch.randn(1, 32, D), *[None] * 6, sampler_noise=torch.randn(3, 1, 32, 30, A))
        optimizer.zero_grad()
        omar.policy_loss(policy, critic, batch, args)[0].sum().backward()
        optimizer.step()
    assert (policy(torch.randn(1, 100, D)) - peak).norm(dim=-1).mean() < 0.15


# ---- Diffusion-QL ----


def test_diffusion_ql_draws_noise_for_every_step_of_its_chains():
    args = options(MA_DIFFUSION_QL, num_seeds=2, diffusion_steps=3)
    batch = MA_DIFFUSION_QL.sample_batch(random_data(3), args)
    assert batch.target_noise.shape == batch.policy_noise.shape == (6, B, 3 * A) and batch.eps.shape == (6, B, A)
    for noise in (batch.target_noise, batch.policy_noise):
        assert len(noise.unique()) == noise.numel()
    called = []  # the times at which the network is asked, which are those that it learns
    ma_diffusion_ql.ddpm(lambda a, t: called.append(t) or a, torch.randn(1, 3 * A), dom2_mpe.NoiseSchedule(), 3)
    close(batch.tau.unique(), sorted(called), 1e-6)


@pytest.mark.parametrize("scenario", ALL_SCENARIOS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_diffusion_ql_learns_as_dom2_but_for_what_makes_it_dom2(scenario, dataset):
    dom2 = (dom2_mamujoco if scenario == "HalfCheetah" else dom2_mpe).DOM2.args(scenario, dataset)
    groups = dom2_mpe.TrainingArgs, dom2_mpe.NetworkArgs
    expected = {field.name: getattr(dom2, field.name) for group in groups for field in fields(group)}
    expected |= {"zeta": 0.0, "prediction": "noise", "augment": False}
    args = asdict(MA_DIFFUSION_QL.args(scenario, dataset))
    assert {name: args[name] for name in expected} == expected
    assert args["eval_candidates"] == 1 and args["shift"] == dom2.shift


# ---- runs ----


TINY = {"num_seeds": 2, "updates": 4, "batch_size": 25, "eval_interval": 4, "eval_episodes": 3, "cuda": False}


@pytest.fixture
def tiny(tmp_path, data_dir, pretrained):
    """tiny(name, scenario): options of a run on 20 episodes."""

    def tiny(name, scenario="simple_spread", dataset="medium", **changes):
        places = {"data_dir": str(data_dir), "run_dir": str(tmp_path / "runs")}
        if scenario in SCENARIOS and len(SCENARIOS[scenario].agents) > SCENARIOS[scenario].num_controlled:
            places["prey"] = str(pretrained / f"{scenario}.pt")
        small = SMALL[name] | ({"window": 25} if name == "ma_sfbc" else {})
        return BASELINES[name].args(scenario, dataset, **TINY | small | places | changes)

    return tiny


def go_on(name, folder, **changes):
    """The run in `folder` continued, or evaluated again, with some options changed."""
    stored, _ = load_checkpoint(folder, BASELINES[name])
    return train(replace(stored, **changes), BASELINES[name])


ACTING = {  # options of acting, which --eval-only may change
    "ma_sfbc": {"eval_alpha": 0.0, "eval_average": 2, "temperature": 0.5},
    "madiff": {"guidance": 0.0, "target_return": 0.1, "temperature": 1.0},
    "ma_diffusion_ql": {"eval_candidates": 5, "temperature": 0.5},
}


@every_baseline
@pytest.mark.parametrize("scenario", ["simple_spread", "simple_tag"])
def test_whole_run(name, scenario, tiny, tmp_path, capsys):
    algorithm = BASELINES[name]
    results = train(tiny(name, scenario), algorithm)
    assert results["algorithm"] == name and results["scenario"] == scenario
    for shift in ("none", "speed"):
        returns = torch.tensor(results["returns"][shift])
        assert returns.shape == (2,) and returns.isfinite().all() and returns[0] != returns[1]
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "results.json").read_text())["returns"] == results["returns"]
    assert f"{NAMES[name]} on {scenario}/medium" in capsys.readouterr().out
    again = go_on(name, folder, eval_only=str(folder), eval_episodes=3)
    assert again["returns"] == results["returns"]
    for option, value in ACTING.get(name, {}).items():
        other = go_on(name, folder, eval_only=str(folder), **{option: value})
        assert other["settings"][option] == value and other["returns"] != results["returns"]
    env, played = parallel_env(scenario), []
    for seed in (0, 1):
        policy, (obs, _) = TrainedPolicy(folder, seed, algorithm=algorithm), env.reset(seed=0)
        actions = policy(obs)
        assert all(env.action_space(agent).contains(actions[agent]) for agent in env.agents)
        env.step(actions)
        played.append([actions[agent].tolist() for agent in env.agents])
    assert played[0] != played[1]


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory, collect):
    """Folder with two episodes of HalfCheetah, to read only."""
    folder = tmp_path_factory.mktemp("cheetah")
    collect("HalfCheetah", "random", folder, num_transitions=2_000)
    return folder


@pytest.mark.parametrize(
    "name", [name if name == "omar" else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_whole_run_on_half_cheetah(name, tiny, cheetah, tmp_path):
    args = tiny(name, "HalfCheetah", "random", data_dir=str(cheetah), eval_episodes=1, shift=("extreme",))
    results = train(args, BASELINES[name])
    for shift in ("none", "extreme"):
        returns = torch.tensor(results["returns"][shift])
        assert returns.shape == (2,) and returns.isfinite().all() and returns[0] != returns[1]
    assert results["data"]["transitions"] == 2_000
    (folder,) = (tmp_path / "runs").iterdir()
    env = common.make_env("HalfCheetah")
    actions = TrainedPolicy(folder, algorithm=BASELINES[name])(
        {agent: torch.zeros(env.obs_size) for agent in env.agents}
    )
    assert [action.shape for action in actions.values()] == [(3,), (3,)]
    assert all(abs(action).max() <= 1 for action in actions.values())


@every_baseline
def test_resume_continues_bit_for_bit(name, tiny, tmp_path):
    whole = train(tiny(name, run_dir=str(tmp_path / "whole")), BASELINES[name])
    train(tiny(name, updates=2), BASELINES[name])
    (whole_folder,), (folder,) = ((tmp_path / runs).iterdir() for runs in ("whole", "runs"))
    assert go_on(name, folder, resume=str(folder), updates=4)["returns"] == whole["returns"]
    expected, found = (load_checkpoint(path, BASELINES[name])[1] for path in (whole_folder, folder))
    assert found["updates"] == 4 and torch.equal(found["rng"], expected["rng"])
    for key, value in expected["learners"].items():
        assert torch.equal(found["learners"][key], value), key
    for optimizer, state in expected["optimizers"].items():
        for i, moments in state["state"].items():
            for key, value in moments.items():
                assert torch.equal(found["optimizers"][optimizer]["state"][i][key], value), (optimizer, i, key)


def words_of(args, *names):
    """The options `names` as words of a command line."""
    words = []
    for name in names:
        value = getattr(args, name)
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.mark.parametrize(
    "name", [name if name == "madiff" else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_script_in_its_own_process(name, tiny, tmp_path):
    """Started from anywhere, it writes into the folder it was started in alone."""
    args = tiny(name, num_seeds=1, updates=2)
    words = words_of(args, "scenario", "dataset", "data_dir", *sorted(TINY | SMALL[name]))
    script = common.ROOT / "baselines" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and f"{NAMES[name]} on" in done.stdout


class Enough(Exception):
    """Raised to end a training that has shown what a test wants to see."""


def data_of(algorithm, args):
    """The dataset that training hands to `sample_batch`."""

    def sample_batch(data, args):
        seen.append(data)
        raise Enough

    seen = []
    with pytest.raises(Enough):
        train(args, algorithm._replace(sample_batch=sample_batch))
    return seen[0]


@every_baseline
def test_augmentation_is_off_unless_asked_for(name, tiny):
    algorithm = BASELINES[name]
    assert torch.equal(data_of(algorithm, tiny(name)).episodes[0], torch.arange(20))
    data = data_of(algorithm, tiny(name, augment=True, quantiles=(0.5,)))
    assert len(data.episodes[0]) == 30
    assert torch.equal(data.episodes[0], augment(data.returns, [data.returns.quantile(0.5)]))


@every_baseline
def test_rewards_are_raw_where_the_settings_were_published_for_raw_ones(name, tiny, data_dir):
    args = tiny(name)
    found = data_of(BASELINES[name], args).reward
    env = common.make_env("simple_spread")
    raw = common.load_dataset(common.dataset_path(data_dir, "simple_spread", "medium"), env).reward
    if name in ("ma_cql", "omar"):
        assert torch.equal(found, raw)
    else:
        close(found.mean(), 0, 1e-4)
        close(found.std(), 0.2 if name == "ma_sfbc" else 1, 1e-4)
    assert torch.equal(found, load_data(args, env, None).reward)


# ---- settings and options ----


@every_baseline
def test_settings_are_valid_and_the_command_line_wins(name):
    algorithm = BASELINES[name]
    scenarios = (*SCENARIOS, *mamujoco_env.SCENARIOS, "module:function")  # the last one: environments of the user's own
    assert algorithm.settings.keys() == {(scenario, dataset) for scenario in scenarios for dataset in DATASETS}
    for robot in mamujoco_env.SCENARIOS:  # no other MuJoCo task has rows of its own
        assert all(algorithm.settings[robot, d] == algorithm.settings["HalfCheetah", d] for d in DATASETS)
    for (scenario, dataset), settings in algorithm.settings.items():
        args = algorithm.args(scenario, dataset)
        assert all(getattr(args, option) == value for option, value in settings.items())
        open_by_choice = {"thresholds", "prey", "resume", "eval_only", "agent_conf"}
        assert {field.name for field in fields(args) if getattr(args, field.name) is None} == open_by_choice
        assert not args.augment
        assert replace(args, updates=7) == algorithm.args(scenario, dataset, updates=7)
    words = ["--scenario", "simple_world", "--dataset", "medium-replay", "--updates", "7", "--augment"]
    assert parse(algorithm, "", words) == algorithm.args("simple_world", "medium-replay", updates=7, augment=True)


# Published with OMAR; on HalfCheetah only cql_alpha and omar_coe are.
OMAR_PUBLISHED = {
    ("simple_spread", "random"): dict(updates=6_000, cql_alpha=0.5, omar_coe=1.0),
    ("simple_spread", "medium-replay"): dict(updates=2_000, cql_alpha=1.0, omar_coe=1.0),
    ("simple_spread", "expert"): dict(updates=2_000, cql_alpha=5.0, omar_coe=1.0),
    ("simple_tag", "medium-replay"): dict(updates=1_000, cql_alpha=0.5, omar_coe=0.9),
    ("simple_tag", "medium"): dict(updates=2_000, cql_alpha=5.0, omar_coe=0.7),
    ("simple_world", "medium-replay"): dict(updates=1_000, cql_alpha=1.0, omar_coe=0.7),
    ("simple_world", "medium"): dict(updates=1_000, cql_alpha=0.5, omar_coe=0.1),
    ("simple_world", "expert"): dict(updates=1_000, cql_alpha=5.0, omar_coe=0.9),
    ("HalfCheetah", "medium-replay"): dict(updates=6_000, cql_alpha=5.0, omar_coe=0.9),
    ("HalfCheetah", "expert"): dict(updates=6_000, cql_alpha=5.0, omar_coe=0.5),
}


@pytest.mark.parametrize("scenario, dataset", OMAR_PUBLISHED)
def test_settings_of_omar_are_the_published_ones(scenario, dataset):
    args, cql = OMAR.args(scenario, dataset), MA_CQL.args(scenario, dataset)
    published = OMAR_PUBLISHED[scenario, dataset]
    assert {name: getattr(args, name) for name in published} == published
    chosen_here = {"batch_norm"}
    assert all(getattr(cql, f.name) == getattr(args, f.name) for f in fields(cql) if f.name not in chosen_here)
    assert args.batch_size == (256 if scenario == "HalfCheetah" else 1024) and args.max_grad_norm == 0.5


def test_landmarks6_has_the_settings_of_simple_spread_and_its_own_shift():
    for algorithm in (MA_BC, MA_TD3BC, MA_CQL, OMAR, MA_SFBC, MADIFF):
        for dataset in DATASETS:
            expected = algorithm.settings["simple_spread", dataset] | {"shift": ("dismiss",)}
            assert algorithm.settings["landmarks6", dataset] == expected


def test_error_ends_the_process_with_exit_code_2(tmp_path, capsys):
    script = common.ROOT / "baselines" / "omar.py"
    words = ["--omar-elites", "11"]
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --omar-elites 11: must be at most --omar-samples 10\n"
    with pytest.raises(SystemExit) as stop:
        parse(OMAR, "", ["--omar-coe", "1.5"])
    assert stop.value.code == 2 and "--omar-coe 1.5: must be in [0, 1]" in capsys.readouterr().err


@every_baseline
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(BASELINES[name], "what it is", ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(BASELINES[name].Args):
        assert f"-{field.name.replace('_', '-')} " in text, field.name


BAD = [
    *((name, option, value) for name in BASELINES for option, value in (("updates", 0), ("batch_size", 0))),
    *((name, "dataset", "best") for name in BASELINES),
    *((name, "scenario", "simple_speaker") for name in BASELINES),
    *((name, "shift", ("wind",)) for name in BASELINES),
    *((name, "quantiles", (1.5,)) for name in BASELINES),
    ("ma_bc", "lr", 0.0),
    ("ma_bc", "widths", ()),
    ("ma_td3bc", "alpha", math.nan),
    ("ma_td3bc", "policy_delay", 0),
    ("ma_td3bc", "target_noise", -0.1),
    ("ma_td3bc", "gamma", 1.0),
    ("ma_cql", "lr", math.inf),
    ("ma_cql", "cql_alpha", -1.0),
    ("ma_cql", "cql_actions", 0),
    ("ma_cql", "cql_policy_actions", -1),
    ("ma_cql", "cql_noise", 0.0),
    ("ma_cql", "rho", 0.0),
    ("omar", "omar_coe", 1.1),
    ("omar", "omar_iterations", 0),
    ("omar", "omar_samples", 0),
    ("omar", "omar_elites", 1),
    ("omar", "omar_elites", 11),
    ("omar", "omar_sigma", 0.0),
    ("ma_sfbc", "window", 0),
    ("ma_sfbc", "eval_average", 9),
    ("ma_sfbc", "alpha", math.inf),
    ("ma_sfbc", "plan_candidates", 0),
    ("ma_sfbc", "eval_candidates", 0),
    ("ma_sfbc", "beta_max", -0.1),
    ("ma_sfbc", "noise_net", "unet"),
    ("madiff", "horizon", 1),
    ("madiff", "width", 3),
    ("madiff", "num_blocks", 0),
    ("madiff", "batch_size", 1),
    ("madiff", "return_dropout", 1.5),
    ("madiff", "guidance", -1.0),
    ("madiff", "beta_max", math.inf),
    ("madiff", "beta_max", 1000.0),
    ("ma_diffusion_ql", "eval_candidates", 0),
    ("ma_diffusion_ql", "prediction", "score"),
]


@pytest.mark.parametrize("name, option, value", BAD)
def test_options_without_a_meaning_are_refused(name, option, value):
    with pytest.raises(UserError) as error:
        BASELINES[name].args(**{"scenario": "simple_spread", option: value})
    assert f"--{option.replace('_', '-')}" in str(error.value) and "\n" not in str(error.value)


@every_baseline
def test_a_folder_without_a_run_is_refused(name, tmp_path):
    for option in ("resume", "eval_only"):
        with pytest.raises(UserError, match="checkpoint"):
            train(BASELINES[name].args(**{option: str(tmp_path)}), BASELINES[name])
        with pytest.raises(UserError, match="checkpoint"):
            parse(BASELINES[name], "", [f"--{option.replace('_', '-')}", str(tmp_path)])


@pytest.mark.parametrize("trained_as", ["ma_cql", "dom2"])
def test_runs_of_another_algorithm_are_refused(trained_as, tiny, tmp_path):
    """Also those whose networks and options would fit, as MA-CQL's fit OMAR and DOM2's fit MA-Diffusion-QL."""
    if trained_as == "dom2":
        args, algorithm = tiny("ma_diffusion_ql", updates=1, prediction="action"), dom2_mpe.DOM2
        names = {field.name for field in fields(algorithm.Args)}
        args = algorithm.Args(**{name: value for name, value in asdict(args).items() if name in names})
    else:
        args, algorithm = tiny(trained_as, updates=1), BASELINES[trained_as]
    train(args, algorithm)
    (folder,) = (tmp_path / "runs").iterdir()
    for name in BASELINES.keys() - {trained_as}:
        with pytest.raises(UserError, match="checkpoint"):
            load_checkpoint(folder, BASELINES[name])
        with pytest.raises(UserError, match="checkpoint"):
            train(BASELINES[name].args(resume=str(folder)), BASELINES[name])
