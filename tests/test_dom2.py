"""DOM2's mathematics against closed forms, finite differences and naive loops over learners, samples and actions.

And what keeps the program easy to read: copies are the same text, files and functions are short, imports have no cycle.
"""

import ast
import copy
import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dom2_mpe
from baselines.ma_diffusion_ql import MA_DIFFUSION_QL, DDPMPolicy, ddpm
from common import ROOT, Dataset, make_env
from dom2_mpe import DOM2, Batch, NoiseSchedule, StackedLinear, TwinCritic, dpm_solver, q_of_candidates
from particle_env import EPISODE_STEPS, ParticleEnv
from run import Run
from utils.data import standardise
from utils.evaluation import assignments
from utils.frozen import policy_action

torch.set_num_threads(1)

every_net = pytest.mark.parametrize("noise_net", dom2_mpe.NOISE_NETS)
every_prediction = pytest.mark.parametrize("prediction", ["action", "noise"])

L, B, D, A = 3, 5, 4, 2  # learners, minibatch, observation and action entries


def close(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def options(scenario="simple_tag", algorithm=DOM2, **changes):
    """Options with tiny networks."""
    small = dict(widths=(8, 6), critic_widths=(7, 9), diffusion_steps=4, batch_size=B, cuda=False)
    small |= dict(eta=2.0, zeta=0.5, max_grad_norm=0.0)
    return algorithm.args(scenario, "random", **small | changes)


def sizes(num_agents=L, obs_size=D):
    """All that `make_learners` wants to know of an environment."""
    return SimpleNamespace(num_agents=num_agents, obs_size=obs_size, action_size=A, device="cpu")


def make_learners(args, num_learners=L, dtype=torch.float64, seed=0, algorithm=DOM2):
    """Learners whose target networks differ from the networks, so that a mix-up of the two would show."""
    torch.manual_seed(seed)
    learners = algorithm.make_learners(args, sizes(num_learners)).to(dtype)
    with torch.no_grad():
        for name in ("target_policy", "target_critic"):
            for p in learners[name].parameters():
                p.add_(0.2 * torch.randn_like(p))
    return learners


def make_batch(args, num_learners=L, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(num_learners, B, *shape, generator=g, dtype=dtype)

    def uniform(*shape):
        return torch.rand(num_learners, B, *shape, generator=g, dtype=dtype) * 2 - 1

    grid = torch.tensor(dom2_mpe.time_grid(args.diffusion_steps), dtype=dtype)
    return Batch(
        obs=normal(D),
        action=uniform(A),
        reward=normal(),
        next_obs=normal(D),
        done=(uniform() > 0.5).to(dtype),
        target_noise=normal(A),
        random_actions=uniform(10, A),
        tau=grid[torch.randint(len(grid), (num_learners, B), generator=g)],
        eps=normal(A),
        policy_noise=normal(A),
    )


def learner_state(module, learner, num_learners=L):
    """What a stacked module's state dict would be, were `learner` its only one."""
    return {k: v.unflatten(0, (num_learners, -1))[learner].clone() for k, v in module.state_dict().items()}


def alone(args, learners, learner, num_learners=L):
    """`learner` cut out of a stack."""
    one = make_learners(args, 1)
    one.load_state_dict(learner_state(learners, learner, num_learners))
    return one


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


# ---- diffusion ----


@pytest.mark.parametrize("beta_min, beta_max", [(0.1, 20.0), (0.1, 10.0), (0.5, 3.0)])
def test_noise_schedule_is_variance_preserving_with_linear_beta(beta_min, beta_max):
    schedule = NoiseSchedule(beta_min, beta_max)
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    beta = beta_min + times * (beta_max - beta_min)
    integral = torch.cumulative_trapezoid(beta, times)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    close(alpha**2 + sigma**2, torch.ones_like(times), 1e-12)
    close(alpha[1:].log(), -0.5 * integral, 1e-12)
    assert alpha[0] == 1 and sigma[0] == 0
    for t in (1e-3, 0.3, 1.0):
        exact = torch.tensor(t, dtype=torch.float64)
        assert isinstance(schedule.alpha(t), float) and isinstance(schedule.sigma(t), float)
        close(schedule.alpha(t), schedule.alpha(exact), 1e-14)
        close(schedule.sigma(t), schedule.sigma(exact), 1e-14)
        assert schedule.sigma(exact.float()).item() == pytest.approx(schedule.sigma(t), rel=1e-5)  # no cancellation


def test_time_grid_is_uniform_from_1_to_a_thousandth():
    for n in (1, 5, 100):
        np.testing.assert_allclose(dom2_mpe.time_grid(n), np.linspace(1.0, 1e-3, n + 1), rtol=0, atol=1e-15)


class Gaussian:
    """Data a_0 ~ N(mu, s^2): the exact noise function and the exact solution of the probability-flow ODE."""

    def __init__(self, mu, s, schedule):
        self.mu, self.s, self.schedule = mu, s, schedule

    def variance(self, t):
        return self.schedule.alpha(t) ** 2 * self.s**2 + self.schedule.sigma(t) ** 2

    def noise(self, a, t):
        assert isinstance(t, float)
        return self.schedule.sigma(t) * (a - self.schedule.alpha(t) * self.mu) / self.variance(t)

    def solution(self, start, t=1e-3):
        scale = math.sqrt(self.variance(t) / self.variance(1.0))
        return self.schedule.alpha(t) * self.mu + scale * (start - self.schedule.alpha(1.0) * self.mu)


START = torch.tensor([-2.0, -0.5, 0.3, 1.7], dtype=torch.float64)
every_schedule = pytest.mark.parametrize("beta_max", [10.0, 20.0])


@every_schedule
@pytest.mark.parametrize("mu, s", [(0.3, 0.5), (-0.4, 0.2), (0.0, 1.0)])
def test_solver_converges_to_the_closed_form_with_order_one(beta_max, mu, s):
    data = Gaussian(mu, s, NoiseSchedule(0.1, beta_max))
    errors = [
        (dpm_solver(data.noise, START, data.schedule, n) - data.solution(START)).abs().max().item()
        for n in (200, 400, 800, 1600)
    ]
    assert errors[-1] < 5e-3
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


@every_schedule
def test_one_solver_step_is_the_formula(beta_max):
    def log_alpha(t):
        return -(beta_max - 0.1) / 4 * t**2 - 0.1 / 2 * t

    alpha_1, alpha_0 = math.exp(log_alpha(1.0)), math.exp(log_alpha(1e-3))
    sigma_1, sigma_0 = math.sqrt(1 - alpha_1**2), math.sqrt(1 - alpha_0**2)
    for a, eps in ((0.7, -0.2), (-1.9, 1.1)):
        expected = alpha_0 / alpha_1 * a - sigma_0 * (alpha_0 * sigma_1 / (alpha_1 * sigma_0) - 1) * eps
        noise = torch.tensor([a], dtype=torch.float64)
        actual = dpm_solver(lambda x, t: torch.full_like(x, eps), noise, NoiseSchedule(0.1, beta_max), 1)  # noqa: B023
        close(actual, torch.tensor([expected], dtype=torch.float64), 1e-9)


def test_solver_evaluates_the_noise_on_its_grid():
    times = []
    dpm_solver(lambda a, t: times.append(t) or a, START, NoiseSchedule(), 5)
    assert times == dom2_mpe.time_grid(5)[:-1]  # the last time is where the action is, not where a step starts


def test_the_printed_eq_4_diverges():
    data, n = Gaussian(0.3, 0.5, NoiseSchedule(0.1, 20.0)), 400
    alpha, sigma = data.schedule.alpha, data.schedule.sigma
    printed, grid = START.clone(), dom2_mpe.time_grid(n)
    for i, j in pairwise(grid):  # tau_i and tau_{i-1}
        factor = sigma(i) * (alpha(i) * sigma(j) / (alpha(j) * sigma(i)) - 1)
        printed = alpha(j) / alpha(i) * printed - factor * data.noise(printed, i)
    exact = data.solution(START)
    assert (dpm_solver(data.noise, START, data.schedule, n) - exact).abs().max() < 0.01
    assert (printed - exact).abs().min() > 1


@every_schedule
@pytest.mark.parametrize("clip", [False, True])
def test_one_solver_step_is_exact_for_a_point_mass(beta_max, clip):
    data = Gaussian(-0.6, 0.0, NoiseSchedule(0.1, beta_max))
    for n in (1, 3):
        close(dpm_solver(data.noise, START, data.schedule, n, clip), data.solution(START), 1e-9)


@every_schedule
def test_solver_clips_the_predicted_action(beta_max):
    schedule = NoiseSchedule(0.1, beta_max)
    inside, border = Gaussian(0.9, 0.0, schedule), Gaussian(1.0, 0.0, schedule)
    outside, below = Gaussian(3.0, 0.0, schedule), Gaussian(-7.0, 0.0, schedule)
    solved = dpm_solver(inside.noise, START, schedule, 5)
    close(dpm_solver(inside.noise, START, schedule, 5, clip=True), solved, 1e-9)
    close(dpm_solver(outside.noise, START, schedule, 5, clip=True), border.solution(START), 1e-9)
    close(dpm_solver(below.noise, START, schedule, 5, clip=True), -border.solution(-START), 1e-9)
    close(dpm_solver(outside.noise, START, schedule, 5), outside.solution(START), 1e-9)


@every_schedule
def test_a_step_of_ancestral_sampling_is_bayes_rule(beta_max):
    """a_{i-1} and a_i are jointly Gaussian given a_0: condition the one on the other."""
    schedule, (s, t, end) = NoiseSchedule(0.1, beta_max), dom2_mpe.time_grid(2)
    a0, start, fresh = 0.4, -1.3, 0.7
    noise = torch.tensor([start, fresh], dtype=torch.float64)
    taken = []

    def noise_fn(a, tau):
        taken.append(a.item())
        return (a - schedule.alpha(tau) * a0) / schedule.sigma(tau)

    last = ddpm(noise_fn, noise, schedule, 2).item()
    for later, earlier, a, eps, result in ((s, t, start, fresh, taken[1]), (t, end, taken[1], 0.0, last)):
        ratio = schedule.alpha(later) / schedule.alpha(earlier)
        means = np.array([schedule.alpha(earlier), schedule.alpha(later)]) * a0
        var_early, var_late = schedule.sigma(earlier) ** 2, schedule.sigma(later) ** 2
        covariance = np.array([[var_early, ratio * var_early], [ratio * var_early, var_late]])
        mean = means[0] + covariance[0, 1] / covariance[1, 1] * (a - means[1])
        variance = covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1]
        assert result == pytest.approx(mean + math.sqrt(variance) * eps, abs=1e-9)


def test_ancestral_sampling_gives_the_distribution_of_the_data():
    data, n = Gaussian(0.3, 0.5, NoiseSchedule(0.1, 20.0)), 400
    noise = torch.randn(20_000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = ddpm(data.noise, noise, data.schedule, n)
    assert a.shape == (20_000, 1)
    assert a.mean().item() == pytest.approx(0.3, abs=0.015)
    assert a.std().item() == pytest.approx(0.5, abs=0.02)
    once = dpm_solver(data.noise, noise[:, :1], data.schedule, n)
    assert np.corrcoef(once[:, 0], noise[:, 0])[0, 1] > 0.99  # the one is a function of the first noise,
    assert abs(np.corrcoef(a[:, 0], noise[:, 0])[0, 1]) < 0.2  # the other forgets it


def test_ancestral_sampling_clips_the_predicted_action():
    schedule, noise = NoiseSchedule(), torch.randn(4, 5, dtype=torch.float64)
    outside, border = Gaussian(3.0, 0.0, schedule), Gaussian(1.0, 0.0, schedule)
    clipped = ddpm(outside.noise, noise, schedule, 5, clip=True)
    close(clipped, ddpm(border.noise, noise, schedule, 5), 1e-9)


# ---- networks ----


def test_stacked_linear_is_one_linear_layer_per_learner():
    torch.manual_seed(0)
    layer, x = StackedLinear(L, 5, 4), torch.randn(L, B, 5)
    for i, y in enumerate(layer(x)):
        plain = nn.Linear(5, 4)
        plain.load_state_dict({"weight": layer.weight[i].T, "bias": layer.bias[i, 0]})
        close(y, plain(x[i]), 1e-6)


def test_stacked_linear_starts_like_a_linear_layer():
    torch.manual_seed(0)
    layer, plain = StackedLinear(4, 64, 400), nn.Linear(64, 400)
    for stacked, single in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert stacked.abs().max() <= 1 / 8  # uniform in +- 1 / sqrt(in)
        assert stacked.abs().max() > 0.98 / 8
        assert stacked.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
        assert stacked.std().item() == pytest.approx(single.std().item(), rel=0.1)
        assert len({tuple(row.flatten()[:3].tolist()) for row in stacked}) == 4  # learners start differently


@every_net
def test_noise_networks(noise_net):
    args = options(noise_net=noise_net)
    net, batch = make_learners(args)["policy"].net, make_batch(args)
    a, obs = batch.policy_noise, batch.obs
    out = net(a, obs, 0.4)
    assert out.shape == (L, B, A) and out.isfinite().all()
    close(net(a, obs, torch.full((L, B), 0.4, dtype=torch.float64)), out)
    close(net(a, obs, torch.full((1, B), 0.4, dtype=torch.float64)), out)
    times = net(a, obs, batch.tau)  # a time for every sample
    for learner in range(L):
        for b in range(B):
            t = batch.tau[learner, b].item()
            close(net(a, obs, t)[learner, b], times[learner, b])
    for other in (net(a + 0.1, obs, 0.4), net(a, obs + 0.1, 0.4), net(a, obs, 0.41)):
        assert (other - out).abs().amax((1, 2)).min() > 1e-5  # everything that it is given matters


def test_residual_noise_network_has_the_shape_of_figure_8():
    """Down, middle and up, every upward block fed with the downward one's output too; a condition of 128 in all."""
    net = dom2_mpe.NOISE_NETS["residual"](L, D, A, (512, 256, 128))
    blocks = [*net.down, net.middle, *net.up]
    sizes = [(A, 512), (512, 256), (256, 128), (128, 128), (2 * 128, 256), (2 * 256, 512)]
    assert [tuple(block.dense1.weight.shape) for block in blocks] == [(L, *size) for size in sizes]
    assert all(block.condition.weight.shape == (L, 128, size[1]) for block, size in zip(blocks, sizes, strict=True))
    assert net.out.weight.shape == (L, 2 * 512, A)
    assert net.obs_in.weight.shape == (L, D, 32) and net.time_condition.weight.shape == (L, 32, 128)


def test_mlp_noise_network_is_a_plain_mlp_per_learner():
    args = options(noise_net="mlp")
    net, batch, t = make_learners(args)["policy"].net, make_batch(args), 0.3
    out = net(batch.policy_noise, batch.obs, t)
    for learner in range(L):
        angle = 2 * math.pi * t * net.time.frequency[learner, 0]
        x = torch.cat([batch.obs[learner], batch.policy_noise[learner]], 1)
        x = torch.cat([x, torch.cat([angle.sin(), angle.cos()]).expand(B, 32)], 1)
        parts = (net.obs_in, net.action_in, net.time_in)
        x = F.linear(x, torch.cat([p.weight[learner] for p in parts]).T, sum(p.bias[learner, 0] for p in parts))
        for layer in net.layers:
            x = F.linear(F.silu(x), layer.weight[learner].T, layer.bias[learner, 0])
        close(out[learner], x)


@every_net
def test_learners_of_a_network_are_independent(noise_net):
    args = options(noise_net=noise_net)
    learners, batch = make_learners(args), make_batch(args)

    def outputs():
        actions = learners["policy"](batch.obs, batch.policy_noise)
        return actions, learners["critic"](batch.obs, batch.action), learners["critic"].q1(batch.obs, batch.action)

    before = outputs()
    with torch.no_grad():
        for p in learners.parameters():
            p.view(L, -1)[1] += 0.1
        batch.obs[1] += 1.0
    for old, new in zip(before, outputs(), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.isclose(old[1], new[1]).any()


@every_net
@every_prediction
def test_policy_is_the_solver_on_its_noise_network(noise_net, prediction):
    args = options(noise_net=noise_net, prediction=prediction)
    policy, batch = make_learners(args)["policy"], make_batch(args)

    def noise(a, t):
        f = policy.net(a, batch.obs, t)
        schedule = policy.schedule
        return f if prediction == "noise" else (a - schedule.alpha(t) * f.tanh()) / schedule.sigma(t)

    a = dpm_solver(noise, batch.policy_noise, policy.schedule, args.diffusion_steps, clip=prediction == "noise")
    actions = policy(batch.obs, batch.policy_noise)
    close(actions, a.clamp(-1, 1))
    assert actions.abs().max() <= 1
    assert (policy(batch.obs, batch.eps) - actions).abs().min() > 0 or prediction == "noise"


def test_policy_of_one_step_acts_what_the_network_predicts():
    args = options(prediction="action", diffusion_steps=1)
    policy, batch = make_learners(args)["policy"], make_batch(args)
    clean = policy.net(batch.policy_noise, batch.obs, 1.0).tanh()
    alpha, sigma = policy.schedule.alpha, policy.schedule.sigma
    eps = (batch.policy_noise - alpha(1.0) * clean) / sigma(1.0)
    close(policy(batch.obs, batch.policy_noise), (alpha(1e-3) * clean + sigma(1e-3) * eps).clamp(-1, 1))


def q_value(critic, learner, twin, obs, action):
    """One twin of one learner as a plain MLP of the observation and the action side by side, a Python float."""
    x, k = torch.cat([obs, action]), 2 * learner + twin
    for layer in critic.layers:
        x = F.linear(x, layer.weight[k].T, layer.bias[k, 0])
        x = x if layer is critic.layers[-1] else x.relu()
    return x.item()


def test_twin_critic_is_two_plain_mlps_per_learner():
    args = options()
    critic, batch = make_learners(args)["critic"], make_batch(args)
    q = q_of_candidates(critic, batch.obs, batch.random_actions)
    assert q.shape == (L, 2, B, 10)
    for learner, twin, b, k in np.ndindex(*q.shape):
        expected = q_value(critic, learner, twin, batch.obs[learner, b], batch.random_actions[learner, b, k])
        assert q[learner, twin, b, k].item() == pytest.approx(expected, rel=1e-10)
    for k in range(10):  # one action per observation
        close(critic(batch.obs, batch.random_actions[:, :, k]), q[..., k])
        close(critic.q1(batch.obs, batch.random_actions[:, :, k]), q[:, 0, :, k])
    first = q_of_candidates(critic.q1, batch.obs, batch.random_actions)
    assert first.shape == (L, B, 10)
    close(first, q[:, 0])


# ---- Eq. 1 ----


def naive_critic_loss(learners, batch, learner, gamma, zeta):
    """Eq. 1 of one learner in plain Python."""
    next_actions = learners["target_policy"](batch.next_obs, batch.target_noise)
    total, part = 0.0, batch.random_actions.shape[1]
    for b in range(B):
        obs, action = batch.obs[learner, b], batch.action[learner, b]
        next_obs, next_action = batch.next_obs[learner, b], next_actions[learner, b]
        bootstrap = min(q_value(learners["target_critic"], learner, k, next_obs, next_action) for k in (0, 1))
        target = batch.reward[learner, b].item() + (0 if batch.done[learner, b] else gamma * bootstrap)
        for twin in (0, 1):
            q = q_value(learners["critic"], learner, twin, obs, action)
            total += (target - q) ** 2 / B
            if b < part:
                samples = [q_value(learners["critic"], learner, twin, obs, a) for a in batch.random_actions[learner, b]]
                total += zeta * (math.log(sum(math.exp(x) for x in samples)) - q) / part
    return total


@pytest.mark.parametrize("zeta, part", [(0.0, B), (0.7, B), (3.0, B), (0.7, 1), (3.0, B - 2)])
def test_critic_loss_is_eq_1(zeta, part):
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    batch = batch._replace(random_actions=batch.random_actions[:, :part])
    networks = learners["critic"], learners["target_critic"], learners["target_policy"]
    loss, metrics = dom2_mpe.critic_loss(*networks, batch, 0.9, zeta)
    assert loss.shape == (L,)
    for learner in range(L):
        assert loss[learner].item() == pytest.approx(naive_critic_loss(learners, batch, learner, 0.9, zeta), rel=1e-9)
    assert all(value.shape == (L,) and not value.requires_grad for value in metrics.values())


def test_critic_loss_without_zeta_ignores_the_random_actions():
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    networks = learners["critic"], learners["target_critic"], learners["target_policy"]
    loss, _ = dom2_mpe.critic_loss(*networks, batch, 0.9, 0.0)
    other, _ = dom2_mpe.critic_loss(*networks, batch._replace(random_actions=batch.random_actions * 9), 0.9, 0.0)
    assert torch.equal(loss, other)


def test_gradient_of_eq_1_reaches_the_critic_alone():
    args = options()
    learners, batch = make_learners(args).requires_grad_(True), make_batch(args)
    networks = learners["critic"], learners["target_critic"], learners["target_policy"]
    loss, _ = dom2_mpe.critic_loss(*networks, batch, 0.9, 0.5)
    loss[1].backward()
    for name in ("policy", "target_policy", "target_critic"):
        assert all(p.grad is None for p in learners[name].parameters())
    for p in learners["critic"].parameters():
        grad = p.grad.view(L, 2, -1)
        assert (grad[1].abs().amax(1) > 0).all()  # both twins of this learner
        assert not grad[[0, 2]].any()  # and of no other


def test_gradient_of_eq_1_takes_the_target_as_given():
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    critic = learners["critic"]  # its own target: a gradient through the target would show
    loss, _ = dom2_mpe.critic_loss(critic, critic, learners["target_policy"], batch, 0.9, 0.0)
    frozen = copy.deepcopy(critic)
    expected, _ = dom2_mpe.critic_loss(critic, frozen, learners["target_policy"], batch, 0.9, 0.0)
    for g, e in zip(gradients(loss.sum(), critic), gradients(expected.sum(), critic), strict=True):
        close(g, e)


# ---- Eq. 3 ----


@every_net
@every_prediction
def test_diffusion_loss_is_eq_3(noise_net, prediction):
    args = options(noise_net=noise_net, prediction=prediction)
    learners, batch = make_learners(args), make_batch(args)
    loss = dom2_mpe.diffusion_loss(learners["policy"], batch)
    assert loss.shape == (L,)
    for learner in range(L):
        net, total = alone(args, learners, learner)["policy"].net, 0.0
        for b in range(B):
            tau, action, eps = batch.tau[learner, b].item(), batch.action[learner, b], batch.eps[learner, b]
            log_alpha = -(args.beta_max - 0.1) / 4 * tau**2 - 0.1 / 2 * tau
            alpha = math.exp(log_alpha)
            noisy = alpha * action + math.sqrt(1 - alpha**2) * eps
            out = net(noisy[None, None], batch.obs[learner, b][None, None], tau)[0, 0].tolist()
            if prediction == "noise":
                total += sum((e - f) ** 2 for e, f in zip(eps.tolist(), out, strict=True))
            else:
                total += sum((a - math.tanh(f)) ** 2 for a, f in zip(action.tolist(), out, strict=True))
        assert loss[learner].item() == pytest.approx(total / B, rel=1e-8)


@pytest.mark.parametrize("tau", [1e-3, 0.3, 1.0])
def test_action_prediction_is_eq_3_with_another_weight(tau):
    args = options(prediction="action")
    policy, batch = make_learners(args)["policy"], make_batch(args)
    batch = batch._replace(tau=torch.full_like(batch.tau, tau))
    alpha, sigma = policy.schedule.alpha(tau), policy.schedule.sigma(tau)
    noisy = alpha * batch.action + sigma * batch.eps
    eps = policy.eps(noisy, batch.obs, tau)
    eq_3 = (batch.eps - eps).square().sum(-1).mean(-1)
    close(dom2_mpe.diffusion_loss(policy, batch), (sigma / alpha) ** 2 * eq_3, 1e-8)


# ---- Eq. 5 ----


@every_net
@every_prediction
def test_q_loss_is_the_q_loss_of_eq_5(noise_net, prediction):
    args = options(noise_net=noise_net, prediction=prediction)
    learners, batch = make_learners(args), make_batch(args)
    loss, metrics = dom2_mpe.q_loss(learners["policy"], learners["critic"], batch, 3.0)
    actions = learners["policy"](batch.obs, batch.policy_noise)
    assert loss.shape == (L,)
    for learner in range(L):
        rows = [(batch.obs[learner, b], batch.action[learner, b], actions[learner, b]) for b in range(B)]
        on_policy = sum(q_value(learners["critic"], learner, 0, obs, a) for obs, _, a in rows) / B
        on_data = sum(abs(q_value(learners["critic"], learner, 0, obs, a)) for obs, a, _ in rows) / B
        assert loss[learner].item() == pytest.approx(-3.0 * on_policy / on_data, rel=1e-9)
    assert all(value.shape == (L,) and not value.requires_grad for value in metrics.values())


@every_net
@every_prediction
@pytest.mark.parametrize("steps", [1, 5])
def test_gradient_through_the_solver_against_finite_differences(noise_net, prediction, steps):
    # little noise at time 1 and a small start: few clipped actions, which have no gradient
    args = options(noise_net=noise_net, prediction=prediction, diffusion_steps=steps, beta_max=2.0)
    learners, batch = make_learners(args), make_batch(args)
    policy, critic = learners["policy"], learners["critic"]
    batch = batch._replace(policy_noise=0.3 * batch.policy_noise)
    parameters = list(policy.parameters())
    loss, _ = dom2_mpe.q_loss(policy, critic, batch, 3.0)
    grads = gradients(loss.sum(), policy)
    g = torch.Generator().manual_seed(2)

    def loss_at(direction, h):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(v, alpha=h)
            value, _ = dom2_mpe.q_loss(policy, critic, batch, 3.0)
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(v, alpha=h)
        return value

    for _ in range(3):
        direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
        slope = (loss_at(direction, 1e-6) - loss_at(direction, -1e-6)) / 2e-6  # [L]
        expected = sum((a * b).view(L, -1).sum(1) for a, b in zip(grads, direction, strict=True))
        assert expected.abs().min() > 1e-4
        close(slope, expected, 1e-5)


@every_prediction
def test_every_denoising_step_passes_the_gradient_on(prediction):
    """The gradient with respect to the noise that starts the chain: it went through all steps."""
    args = options(prediction=prediction, beta_max=2.0)
    learners, batch = make_learners(args), make_batch(args)
    noise = (0.3 * batch.policy_noise).requires_grad_()
    loss, _ = dom2_mpe.q_loss(learners["policy"], learners["critic"], batch._replace(policy_noise=noise), 3.0)
    loss.sum().backward()
    assert (noise.grad.abs().amax((1, 2)) > 1e-6).all()


def test_normaliser_of_eq_5_is_the_mean_absolute_q():
    """Q-values far below zero must not turn the objective around, whatever their mean's sign."""
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    policy, critic, last = learners["policy"], learners["critic"], learners["critic"].layers[-1].bias
    scaled = []
    for offset in (+100.0, -100.0):
        with torch.no_grad():
            last += offset
        grads = gradients(dom2_mpe.q_loss(policy, critic, batch, 1.0)[0].sum(), policy)
        scale = critic(batch.obs, batch.action)[:, 0].abs().mean(1)
        scaled.append([(g.view(L, -1) * scale[:, None]) for g in grads])
        with torch.no_grad():
            last -= offset
    assert max(g.abs().max() for g in scaled[0]) > 1e-3
    for up, down in zip(*scaled, strict=True):
        close(up, down, 1e-8)


def test_normaliser_of_eq_5_is_a_constant_for_the_gradient():
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    policy, critic = learners["policy"], learners["critic"]
    loss, _ = dom2_mpe.q_loss(policy, critic, batch, 3.0)
    scale = critic(batch.obs, batch.action)[:, 0].abs().mean(1).tolist()
    q = critic(batch.obs, policy(batch.obs, batch.policy_noise))[:, 0].mean(1)
    expected = sum(-3.0 * q[i] / scale[i] for i in range(L))
    for module in (policy, critic):
        for g, e in zip(gradients(loss.sum(), module), gradients(expected, module), strict=True):
            close(g, e)


# ---- Algorithm 1 ----


@pytest.mark.parametrize("thresholds", [(), (2.0,), (2.0, 2.0), (-9.0, 1.0, 2.5, 99.0), (-9.0, -8.0, -7.0)])
def test_augment_gives_the_weights_of_algorithm_1(thresholds):
    returns = torch.tensor([2.0, -3.0, 2.5, 1.0, 7.0, 2.0])
    indices = dom2_mpe.augment(returns, thresholds)
    assert indices.dtype == torch.int64 and indices.ndim == 1  # indices alone: no transition is copied
    weights = [1 + sum(1 for r in thresholds if r <= value) for value in returns.tolist()]
    assert torch.bincount(indices, minlength=len(returns)).tolist() == weights


def coded_data(num_agents, num_episodes, replicated):
    """A dataset of whose every number says which agent, time and column it is; its minibatches are of `replicated`."""
    T, W = num_episodes * EPISODE_STEPS, 2 * D + A + 2
    rows = torch.arange(num_agents * T * W, dtype=torch.float32).view(num_agents, T, W)
    obs, action, reward, next_obs, done = rows.split([D, A, 1, D, 1], -1)
    starts, lengths = torch.arange(num_episodes) * EPISODE_STEPS, torch.full((num_episodes,), EPISODE_STEPS)
    columns = obs, action, reward[..., 0], next_obs, done[..., 0]
    data = Dataset(*columns, starts, lengths, torch.zeros(num_episodes), {}, {"all": num_episodes})
    return data.replicated(lambda returns: torch.tensor(replicated)), T, W


def test_minibatches_are_drawn_from_the_own_agent_with_the_weights_of_algorithm_1():
    torch.manual_seed(0)
    data, T, W = coded_data(3, 4, [0, 1, 1, 3])
    batch = dom2_mpe.sample_batch(data, options(batch_size=4000, num_seeds=2))
    first = batch.obs[..., :1]  # the code of a row's first column
    assert torch.equal(batch.obs, first + torch.arange(D))
    assert torch.equal(batch.action, first + D + torch.arange(A))
    assert torch.equal(batch.reward, first[..., 0] + D + A)
    assert torch.equal(batch.next_obs, first + D + A + 1 + torch.arange(D))
    assert torch.equal(batch.done, first[..., 0] + 2 * D + A + 1)
    row = first[..., 0].long() // W  # [6, 4000]
    assert (first[..., 0].long() % W == 0).all()
    assert torch.equal(row // T, (torch.arange(6) % 3)[:, None].expand(6, 4000))  # seed-major learners
    episode, step = row % T // EPISODE_STEPS, row % EPISODE_STEPS
    shares = torch.stack([torch.bincount(e, minlength=4) / 4000 for e in episode])
    close(shares, torch.tensor([0.25, 0.5, 0.0, 0.25]).expand(6, 4), 0.04)
    close(torch.bincount(step.flatten(), minlength=EPISODE_STEPS) / 24_000, torch.full((25,), 0.04), 0.01)
    assert len({tuple(r[:10].tolist()) for r in row % T}) == 6  # every learner draws its own


def test_minibatches_of_episodes_of_different_lengths_are_uniform_over_their_rows():
    torch.manual_seed(0)
    columns, lengths = torch.arange(9.0).view(1, 9), torch.tensor([2, 3, 4])
    obs, starts = columns[..., None], torch.tensor([0, 2, 5])
    data = Dataset(obs, obs, columns, obs, columns, starts, lengths, torch.tensor([1.0, 5.0, 3.0]), {}, {"all": 3})
    data = data.replicated(lambda returns: dom2_mpe.augment(returns, (2.0, 4.0)))
    assert sorted(data.episodes[0].tolist()) == [0, 1, 1, 1, 2, 2]
    rows = dom2_mpe.sample_batch(data, options(batch_size=40_000)).reward[0].long()
    expected = torch.tensor([1] * 2 + [3] * 3 + [2] * 4) / (2 + 9 + 8)
    close(torch.bincount(rows, minlength=9) / 40_000, expected, 0.01)


def test_random_numbers_of_an_update():
    torch.manual_seed(0)
    args = options(batch_size=4000, num_seeds=2)
    batch = dom2_mpe.sample_batch(coded_data(3, 4, range(4))[0], args)
    assert batch.random_actions.shape == (6, 1000, 10, A)  # for a quarter of the minibatch
    assert batch.random_actions.abs().max() <= 1
    close(batch.random_actions.mean((0, 1, 2)), torch.zeros(A), 0.01)
    close(batch.random_actions.std((0, 1, 2)), torch.full((A,), 3**-0.5), 0.01)
    grid = torch.tensor(dom2_mpe.time_grid(args.diffusion_steps))
    values, counts = batch.tau.unique(return_counts=True)
    close(values, grid.sort().values, 2e-7)  # Eq. 3: tau ~ U({tau_0, ..., tau_N}), in float32
    close(counts / counts.sum(), torch.full((len(grid),), 1 / len(grid)), 0.02)
    noises = torch.stack([batch.target_noise, batch.eps, batch.policy_noise]).flatten(1)
    close(noises.mean(1), torch.zeros(3), 0.02)
    close(torch.cov(noises), torch.eye(3), 0.03)  # and independent of each other


def test_rewards_are_standardised_over_all_agents():
    reward = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 7 - 90
    before, done = reward.clone(), torch.zeros(3, 200)
    after = standardise(reward, done)
    assert after.mean().item() == pytest.approx(0, abs=1e-4)
    assert after.std().item() == pytest.approx(1, rel=1e-4)
    close(after.argsort(), before.argsort())  # order and
    close(np.corrcoef(after.flatten(), before.flatten())[0, 1], np.float64(1.0), 1e-6)  # proportions stay
    assert torch.equal(reward, before)
    done[1, 7] = 1  # where an episode can end, a constant reward is worth something: the mean stays
    close(standardise(reward, done), before / before.double().std(), 1e-5)


def test_constant_rewards_stay_finite():
    assert not standardise(torch.full((2, 25), 3.0), torch.zeros(2, 25)).any()


# ---- Algorithm 2 ----


def test_target_networks_start_equal():
    learners = dom2_mpe.make_learners(options(), sizes())
    for name in ("policy", "critic"):
        state, target = learners[name].state_dict(), learners[f"target_{name}"].state_dict()
        assert state.keys() == target.keys()
        assert all(torch.equal(state[k], target[k]) for k in state)
        assert not any(p.requires_grad for p in learners[f"target_{name}"].parameters())
        assert all(p.requires_grad for p in learners[name].parameters())


@pytest.mark.parametrize("rho", [0.0, 0.01, 1.0])
def test_soft_update(rho):
    torch.manual_seed(0)
    source, target = StackedLinear(L, 3, 4).double(), StackedLinear(L, 3, 4).double()
    pairs = list(zip(source.parameters(), [p.clone() for p in target.parameters()], strict=True))
    dom2_mpe.soft_update(target, source, rho)
    for (s, old), new in zip(pairs, target.parameters(), strict=True):
        close(new, rho * s + (1 - rho) * old, 1e-14)


@pytest.mark.parametrize("changes", [{}, {"zeta": 0.0}, {"eta": 0.0}, {"bc_weight": 0.3}], ids=str)
def test_update_is_algorithm_2(changes):
    args = options(actor_lr=0.01, critic_lr=0.02, rho=0.1, **changes)
    learners = make_learners(args)
    expected = copy.deepcopy(learners)
    optimizers = dom2_mpe.make_optimizers(args, learners)
    lrs = {"policy": args.actor_lr, "critic": args.critic_lr}
    reference = {k: torch.optim.Adam(expected[k].parameters(), lr, foreach=False) for k, lr in lrs.items()}

    def step(name, loss):
        for p, g in zip(expected[name].parameters(), gradients(loss.sum(), expected[name]), strict=True):
            p.grad = g
        reference[name].step()

    for seed in range(3):
        batch = make_batch(args, seed=seed)
        dom2_mpe.update(learners, optimizers, batch, args)
        policy, critic = expected["policy"], expected["critic"]
        targets = expected["target_critic"], expected["target_policy"]
        if args.eta:  # line 6
            step("critic", dom2_mpe.critic_loss(critic, *targets, batch, args.gamma, args.zeta)[0])
        loss = args.bc_weight * dom2_mpe.diffusion_loss(policy, batch)
        if args.eta:  # line 7: by the critics of line 6
            loss = loss + dom2_mpe.q_loss(policy, critic, batch, args.eta)[0]
        step("policy", loss)
        for name in ("critic", "policy") if args.eta else ("policy",):  # line 8
            with torch.no_grad():
                for t, p in zip(expected[f"target_{name}"].parameters(), expected[name].parameters(), strict=True):
                    t.copy_(0.1 * p + 0.9 * t)
        for (name, actual), wanted in zip(learners.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_net
@every_prediction
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_learners_trained_together_are_those_trained_alone(noise_net, prediction, max_grad_norm):
    args = options(noise_net=noise_net, prediction=prediction, max_grad_norm=max_grad_norm, actor_lr=0.01, rho=0.1)
    together = make_learners(args)
    start = {k: v.clone() for k, v in together.state_dict().items()}
    singles = [alone(args, together, learner) for learner in range(L)]
    optimizers = dom2_mpe.make_optimizers(args, together)
    single_optimizers = [dom2_mpe.make_optimizers(args, single) for single in singles]
    for seed in range(4):
        batch = make_batch(args, seed=seed)
        metrics = dom2_mpe.update(together, optimizers, batch, args)
        for learner, single in enumerate(singles):
            cut = Batch(*(x[learner : learner + 1] for x in batch))
            own = dom2_mpe.update(single, single_optimizers[learner], cut, args)
            for tag, value in own.items():
                close(metrics[tag][learner : learner + 1], value, 1e-7)
    for learner, single in enumerate(singles):
        for name, value in learner_state(together, learner).items():
            close(value, single.state_dict()[name], 1e-7)
            assert "frequency" in name or not torch.equal(value, start[name].unflatten(0, (L, -1))[learner])


@pytest.mark.parametrize("reward", [float("nan"), 1e300])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_a_broken_learner_leaves_the_others_alone(reward, max_grad_norm):
    args = options(max_grad_norm=max_grad_norm)
    healthy = make_learners(args)
    broken = copy.deepcopy(healthy)
    for learners, value in ((healthy, 0.0), (broken, reward)):
        optimizers = dom2_mpe.make_optimizers(args, learners)
        for seed in range(3):
            batch = make_batch(args, seed=seed)
            batch.reward[0] = value
            dom2_mpe.update(learners, optimizers, batch, args)
    for a, b in zip(healthy.state_dict().values(), broken.state_dict().values(), strict=True):
        assert torch.equal(a.unflatten(0, (L, -1))[1:], b.unflatten(0, (L, -1))[1:])
    assert not torch.equal(healthy["critic"].layers[-1].weight[0], broken["critic"].layers[-1].weight[0])


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_gradients_are_clipped_per_learner(max_norm):
    torch.manual_seed(0)
    learners = nn.ModuleDict({"critic": TwinCritic(L, D, A, (7,)), "policy": StackedLinear(L, D, A)}).double()
    parameters = list(learners["critic"].parameters())
    optimizers = {"critic": torch.optim.SGD(parameters, lr=1.0)}  # its step is the gradient
    scales = torch.tensor([0.001, 1.0, 1000.0], dtype=torch.float64)[:, None]
    grads = [torch.randn_like(p).view(L, -1) * scales for p in parameters]
    before = torch.cat([p.detach().view(L, -1) for p in parameters], 1)
    loss = sum((g * p.view(L, -1)).sum(1) for g, p in zip(grads, parameters, strict=True))
    loss = loss + sum(p.view(L, -1).sum(1) for p in learners["policy"].parameters())
    dom2_mpe.gradient_step(learners, optimizers, "critic", loss, max_norm)
    step = before - torch.cat([p.detach().view(L, -1) for p in parameters], 1)
    norms = [math.sqrt(sum(x * x for x in row)) for row in torch.cat(grads, 1).tolist()]
    assert norms[0] < 0.5 < norms[1]
    for learner, norm in enumerate(norms):
        close(step[learner], torch.cat(grads, 1)[learner] * (min(1.0, max_norm / norm) if max_norm else 1.0), 1e-9)
    assert all(p.grad is None for p in learners["policy"].parameters())  # the other network in the loss


def test_a_step_down_the_q_loss_moves_the_policy_alone():
    args = options()
    learners, batch = make_learners(args), make_batch(args)
    optimizers, before = dom2_mpe.make_optimizers(args, learners), copy.deepcopy(learners)
    loss, _ = dom2_mpe.q_loss(learners["policy"], learners["critic"], batch, 1.0)
    dom2_mpe.gradient_step(learners, optimizers, "policy", loss, 0.0)
    for name, old in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(old.parameters(), learners[name].parameters(), strict=True)]
        assert all(moved) if name == "policy" else not any(moved)
        assert name == "policy" or all(p.grad is None for p in learners[name].parameters())


# ---- acting and evaluation ----


class Still(nn.Module):
    """A policy without noise: every learner does a function of the observation's position."""

    def __init__(self, table, share=0.0):
        super().__init__()
        self.table, self.share = table, share  # [L, A]

    def forward(self, obs, noise):
        return (self.table[:, None] + 0.1 * obs[..., 2:4] + self.share * noise[..., :A]).clamp(-1, 1)


def test_act_of_one_candidate_samples_the_policy():
    args = options()
    learners, obs = make_learners(args, dtype=torch.float32), torch.randn(L, 6, D)
    given = []
    learners["target_policy"].register_forward_hook(lambda module, inputs, output: given.append((inputs, output)))
    actions = dom2_mpe.act(learners, obs, args, torch.Generator().manual_seed(3))
    assert actions.shape == (L, 6, A)
    ((seen, noise), output), *more = given
    assert not more and torch.equal(seen, obs) and torch.equal(output, actions)
    assert noise.shape == (L, 6, A) and len(noise.unique()) == noise.numel()
    assert torch.equal(dom2_mpe.act(learners, obs, args, torch.Generator().manual_seed(3)), actions)


def test_act_of_many_candidates_takes_the_best_by_the_smaller_twin():
    K, E = 7, 6
    args = options(algorithm=MA_DIFFUSION_QL, eval_candidates=K)
    learners = make_learners(args, dtype=torch.float32, algorithm=MA_DIFFUSION_QL)
    assert type(learners["policy"]) is DDPMPolicy
    obs = torch.randn(L, E, D, generator=torch.Generator().manual_seed(0))
    seen = []
    learners["critic"].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    actions = MA_DIFFUSION_QL.act(learners, obs, args, torch.Generator().manual_seed(3))
    ((critic_obs, candidates),) = seen
    assert torch.equal(critic_obs, obs.repeat_interleave(K, 1)) and candidates.shape == (L, E * K, A)
    candidates, chosen = candidates.view(L, E, K, A), set()
    for learner, e in np.ndindex(L, E):
        values = [
            min(q_value(learners["critic"], learner, twin, obs[learner, e], a) for twin in (0, 1))
            for a in candidates[learner, e]
        ]
        best = int(np.argmax(values))
        chosen.add(best)
        assert torch.equal(actions[learner, e], candidates[learner, e, best])
    assert len(chosen) > 2


def test_candidates_are_samples_for_their_own_observation():
    args = options(algorithm=MA_DIFFUSION_QL, eval_candidates=7)
    learners = make_learners(args, dtype=torch.float32, algorithm=MA_DIFFUSION_QL)
    learners["target_policy"] = Still(torch.tensor([[0.1, 0.2], [-0.3, 0.4], [0.5, -0.6]]), share=1e-3)
    obs, seen = torch.randn(L, 6, D, generator=torch.Generator().manual_seed(0)), []
    learners["critic"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].view(L, 6, 7, A)))
    MA_DIFFUSION_QL.act(learners, obs, args, torch.Generator().manual_seed(3))
    expected = learners["target_policy"].table[:, None] + 0.1 * obs[..., 2:4]
    assert (seen[0] - expected[:, :, None]).abs().max() < 0.01
    assert (seen[0].std(2) > 1e-5).all()  # and no two alike
    args.temperature = 0.0
    MA_DIFFUSION_QL.act(learners, obs, args, torch.Generator().manual_seed(3))
    assert torch.equal(seen[1], expected[:, :, None].expand_as(seen[1]))  # without noise they are


def random_prey(obs_size, seed=0):
    g, sizes = torch.Generator().manual_seed(seed), (obs_size, 8, 8, 2)
    return {
        f"fc{i}.{kind}": torch.randn((sizes[i], sizes[i - 1]) if kind == "weight" else (sizes[i],), generator=g)
        for i in (1, 2, 3)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("scenario", ["simple_spread", "simple_tag", "simple_world"])
@pytest.mark.parametrize("shift", ["none", "speed"])
def test_evaluate_plays_every_team_in_its_own_worlds(scenario, shift):
    S, E, n = 2, 3, 3
    args, twin = options(scenario, num_seeds=S), ParticleEnv(scenario, S * E, shift, seed=5)
    prey = random_prey(twin.obs_sizes[-1]) if twin.num_agents > n else None
    env = make_env(scenario, S * E, shift, seed=5, prey=prey and partial(policy_action, prey))
    policy = Still(torch.rand(S * n, A, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8)
    steps, env_step = [], env.step

    def act(obs, generator):
        assert obs.shape == (S * n, E, env.obs_size)
        return policy(obs, torch.zeros(1))

    def step(actions):
        steps.append(env.world.agent_pos.clone())
        return env_step(actions)

    env.step = step
    returns = dom2_mpe.evaluate(act, env, args)
    assert returns.shape == (S, E) and len(steps) == EPISODE_STEPS

    expected, obs = [0.0] * (S * E), twin.reset()
    for t in range(EPISODE_STEPS):
        close(steps[t], twin.agent_pos, 1e-4)
        actions = torch.zeros(S * E, twin.num_agents, 2)
        for world in range(S * E):
            for agent in range(n):
                action = policy.table[world // E * n + agent] + 0.1 * obs[agent][world, 2:4]
                actions[world, agent] = action.clamp(-1, 1)
            if prey is not None:
                actions[world, n] = policy_action(prey, obs[n][world])
        obs, rewards = twin.step(actions)
        for world in range(S * E):
            expected[world] += sum(rewards[world, :n].tolist()) / n
    close(returns.flatten(), torch.tensor(expected), 1e-3)
    assert len({round(x, 3) for x in expected}) == S * E


def test_evaluation_depends_on_seed_and_shift_alone():
    def score(shift="none", other=0, **changes):
        torch.manual_seed(other)  # the global generator plays no part
        run = Run(options("simple_spread", num_seeds=2, eval_episodes=10, **changes), DOM2)
        run.learners = learners
        returns = dom2_mpe.evaluate(run.act, run.evaluation_env(shift), run.args)
        assert returns.shape == (2, 10)
        return returns.mean(1)

    torch.manual_seed(0)
    learners = dom2_mpe.make_learners(options(), sizes(6, 18))
    first = score()
    assert torch.equal(first, score(other=1))
    assert (first != score(shift="speed")).all()
    assert (first != score(seed=1)).all()


@pytest.mark.parametrize("shift", ["none", "dismiss"])
def test_assignments_are_counted_from_one_start(shift):
    run = Run(options("landmarks6", num_seeds=2), DOM2)

    def wander(obs, generator):  # seed 0's agents go anywhere, seed 1's stay
        direction = obs[..., :2] / obs[..., :2].norm(dim=-1, keepdim=True).clamp(min=1e-6)
        noise = torch.randn(*obs.shape[:2], 2, generator=generator)
        return (
            torch.where(direction.any(-1, keepdim=True), direction, noise)
            * torch.tensor([1.0] * 3 + [0.0] * 3)[:, None, None]
        )

    run.act = wander
    found = assignments(run, shift, starts=1, episodes=10)
    paths, landmarks = np.array(found["paths"]), np.array(found["landmarks"])
    assert paths.shape == (10, 26, 3, 2) and landmarks.shape == (6, 2)
    assert (paths[:, 0] == paths[0, 0]).all()  # one start
    assert len(np.unique(landmarks, axis=0)) == {"none": 6, "dismiss": 3}[shift]
    ends = [
        tuple(tuple(min(landmarks.tolist(), key=lambda x: math.dist(x, end))) for end in path[-1]) for path in paths
    ]
    shares = [ends.count(way) / 10 for way in set(ends)]
    assert len(shares) > 1
    assert found["distinct"] == [len(shares), 1.0]
    assert found["entropy"] == pytest.approx([-sum(p * math.log2(p) for p in shares), 0.0], abs=1e-5)


def test_assignments_are_those_of_the_shift():
    run = Run(options("landmarks6"), DOM2)
    run.act = lambda obs, generator: torch.ones(*obs.shape[:2], 2)
    standard, slower = (np.array(assignments(run, shift, 1, 10)["paths"]) for shift in ("none", "speed"))
    assert (standard[:, 0] == slower[:, 0]).all()  # the same start
    assert (np.abs(slower - slower[:, :1]).sum((1, 3)) < np.abs(standard - standard[:, :1]).sum((1, 3))).all()


# ---- it learns ----


@every_prediction
def test_policy_covers_both_modes_where_regression_sits_between_them(prediction):
    """Two equally good actions per observation, m(o) and -m(o)."""
    torch.manual_seed(0)
    size, args = 256, options(prediction=prediction, widths=(64, 64), diffusion_steps=10)
    net = dom2_mpe.NOISE_NETS[args.noise_net](1, 1, A, args.widths)
    schedule = NoiseSchedule(beta_max=args.beta_max)
    policy = dom2_mpe.DiffusionPolicy(net, schedule, args.diffusion_steps, prediction)
    regression = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, A))
    optimizer = torch.optim.Adam([*policy.parameters(), *regression.parameters()], 3e-3)
    grid = torch.tensor(dom2_mpe.time_grid(args.diffusion_steps))

    nothing = Batch(*[None] * len(Batch._fields))

    def mode(obs):
        return torch.cat([0.7 + 0.2 * obs, -0.7 + 0.2 * obs], -1)

    for _ in range(1500):
        obs = torch.rand(1, size, 1) * 2 - 1
        sign = torch.randint(2, (1, size, 1)) * 2.0 - 1
        tau, eps = grid[torch.randint(len(grid), (1, size))], torch.randn(1, size, A)
        batch = nothing._replace(obs=obs, action=sign * mode(obs), tau=tau, eps=eps)
        loss = dom2_mpe.diffusion_loss(policy, batch).sum()
        loss = loss + (regression(obs) - batch.action).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    obs = torch.linspace(-1, 1, 5).repeat_interleave(400)[None, :, None]
    with torch.no_grad():
        actions, between = policy(obs, torch.randn(1, 2000, A)), regression(obs)
    m = mode(obs)
    near = torch.stack([(actions - sign * m).abs().amax(-1) < 0.25 for sign in (1, -1)])  # [2, 1, 2000]
    shares = near.view(2, 5, 400).float().mean(-1)  # of each mode, for each of the five observations
    assert shares.min() > 0.3, shares
    assert shares.sum(0).min() > 0.8, shares
    assert between.abs().max() < 0.3


def test_parts_serve_another_project():
    """Its own data, one learner, and none of the machinery of a run."""
    torch.manual_seed(0)
    size, steps, schedule = 256, 10, NoiseSchedule()
    policy = dom2_mpe.DiffusionPolicy(dom2_mpe.MLPNoiseNet(1, 3, 1, (64, 64)), schedule, steps)
    critic, grid = TwinCritic(1, 3, 1, (64,)), torch.tensor(dom2_mpe.time_grid(steps))
    optimizers = [torch.optim.Adam(network.parameters(), 1e-2) for network in (policy, critic)]
    obs, beginning = torch.rand(1, 1000, 3) * 2 - 1, torch.randn(1, 1000, 1)

    def actions_after(updates, eta):
        for _ in range(updates):
            o, action = torch.rand(1, size, 3) * 2 - 1, 1.2 * torch.randint(2, (1, size, 1)) - 0.6
            tau, (start, eps, noise) = grid[torch.randint(steps + 1, (1, size))], torch.randn(3, 1, size, 1)
            batch = Batch(o, action, action[..., 0], o, torch.ones(1, size), start, action[:, :, None], tau, eps, noise)
            bc, q = dom2_mpe.diffusion_loss(policy, batch), dom2_mpe.q_loss(policy, critic, batch, eta)[0]
            td, _ = dom2_mpe.critic_loss(critic, critic, policy, batch, gamma=0.9, zeta=0.0)  # the reward is the action
            for network, optimizer, loss in zip((policy, critic), optimizers, (bc + q, td), strict=True):
                optimizer.zero_grad()
                loss.sum().backward(inputs=list(network.parameters()))
                optimizer.step()
        with torch.no_grad():
            return dpm_solver(lambda a, t: policy.eps(a, obs, t), beginning, schedule, steps)

    actions = actions_after(400, eta=0.0)
    shares = [((actions - mode).abs() < 0.2).float().mean().item() for mode in (-0.6, 0.6)]
    assert min(shares) > 0.25 and sum(shares) > 0.6
    assert (actions_after(200, eta=0.3) > 0.4).float().mean() > 0.9  # Eq. 5: the better mode alone


# ---- precision ----


def accelerated(step, **changes):
    """`step` as a run with these options makes it."""
    return Run(options(**changes), DOM2).accelerate(step)


def test_precision_is_float32_unless_asked_for():
    for algorithm in (DOM2, MA_DIFFUSION_QL):
        assert algorithm.args().bf16 is False
    assert accelerated(step := object()) is step
    asked = accelerated(lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")), bf16=True)
    assert asked() == (True, torch.bfloat16) and not torch.is_autocast_enabled("cpu")


def test_precision_is_decided_in_one_place():
    """Run.accelerate alone reads the option; nothing but it and the benchmark switches bfloat16 on.

    A trained policy switches off what the calling program has switched on.
    """
    readers, switches = set(), set()
    for path, tree in sources().items():
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef):
                names = {x.attr for x in ast.walk(scope) if isinstance(x, ast.Attribute)}
                readers |= {(path, scope.name)} if "bf16" in names else set()
                switches |= {(path, scope.name)} if names & {"autocast", "bfloat16"} else set()
    assert readers == {("run.py", "accelerate")}
    assert switches - {("utils/policies.py", "torch_defaults")} == {
        ("run.py", "accelerate"),
        ("experiments/benchmark.py", "bf16_speedup_cpu"),
    }


@every_net
@every_prediction
def test_bf16_is_a_rounding(noise_net, prediction):
    results = []
    for bf16 in (False, True):
        args = options(noise_net=noise_net, prediction=prediction, widths=(64, 64), critic_widths=(64, 64))
        learners, batch = make_learners(args, dtype=torch.float32), make_batch(args, dtype=torch.float32)
        networks = learners["critic"], learners["target_critic"], learners["target_policy"]

        def step():
            bc = dom2_mpe.diffusion_loss(learners["policy"], batch)  # noqa: B023
            td = dom2_mpe.critic_loss(*networks, batch, 0.9, 0.5)[0]  # noqa: B023
            grads = gradients(bc.sum(), learners["policy"]) + gradients(td.sum(), learners["critic"])  # noqa: B023
            return bc, td, torch.cat([g.flatten() for g in grads])

        results.append(accelerated(step, bf16=bf16)())
        assert {x.dtype for x in (*results[-1], *learners.parameters())} == {torch.float32}
    for exact, rounded in zip(*results, strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert 1e-6 < error < 0.1  # eight bits of mantissa, through all layers


# ---- the text ----


def sources():
    """{path in the repository: syntax tree} of the program, without its tests."""
    paths = [p for folder in (".", "utils", "baselines", "experiments") for p in sorted((ROOT / folder).glob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in paths}


def test_files_and_functions_stay_short():
    limits = {"dom2_mpe.py": 600, "dom2_mamujoco.py": 600, "common.py": 150, "run.py": 350, "collect_datasets.py": 400}
    for name, limit in limits.items():
        assert len((ROOT / name).read_text().splitlines()) <= limit, name
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, f"{path}: {node.name}"


def imports():
    """{module: modules of this repository that it imports somewhere}; packages' own files are empty."""
    trees = {path.removesuffix(".py").replace("/", "."): tree for path, tree in sources().items()}
    graph = {}
    for module, tree in trees.items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0  # of absolute imports alone
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[module] = names & trees.keys()
    return graph


def test_imports_have_no_cycle():
    graph = imports()
    assert {"utils.data", "run"} <= graph["dom2_mpe"] and "mamujoco_env" in graph["common"]  # also within a function
    while graph:
        leaves = {module for module, needs in graph.items() if not needs}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}


def test_a_baseline_is_read_in_three_files():
    graph, dom2 = imports(), {"dom2_mpe", "dom2_mamujoco"}
    algorithms = {module for module in graph if module.startswith("baselines.")} - {"baselines.__init__"}
    for module in algorithms - {"baselines.shared"}:
        others = graph[module] & (algorithms | dom2) - {module}
        if module == "baselines.ma_diffusion_ql":  # whose settings are those of both
            others -= {"dom2_mamujoco"}
        assert len(others) <= 2, f"{module}: {sorted(others)}"
    assert len(algorithms) == 8


# ---- options that the half cheetah's settings turn on ----


def test_critics_with_layer_normalisation_against_a_loop():
    torch.manual_seed(0)
    L, B, d, A, W = 3, 5, 4, 2, 7
    critic = dom2_mpe.TwinCritic(L, d, A, (W, W), layer_norm=True)
    obs, action = torch.randn(L, B, d), torch.randn(L, B, A)
    found = critic(obs, action)
    for learner in range(L):
        for twin in range(2):
            row = 2 * learner + twin
            for b in range(B):
                x = torch.cat([obs[learner, b], action[learner, b]])
                for i, layer in enumerate(critic.layers):
                    x = x @ layer.weight[row] + layer.bias[row, 0]
                    if i < 2:
                        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
                        x = x.clamp(min=0)
                close(found[learner, twin, b], x[0], 1e-5)
    close(critic.q1(obs, action), found[:, 0], 1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_acting_starts_from_noise_of_the_given_temperature(temperature):
    args = options(temperature=temperature)
    learners = dom2_mpe.make_learners(args, SimpleNamespace(num_agents=3, obs_size=18, action_size=2, device="cpu"))
    torch.nn.init.zeros_(learners["policy"].net.layers[-1].weight)  # the target policy is another one, and it acts
    obs = torch.randn(3, 4, 18)
    found = dom2_mpe.act(learners, obs, args, torch.Generator().manual_seed(1))
    noise = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found, learners["target_policy"](obs, temperature * noise))
    other = dom2_mpe.act(learners, obs, args, torch.Generator().manual_seed(2))
    assert torch.equal(found, other) == (temperature == 0)
