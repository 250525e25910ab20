"""Show a trained policy in a window, or write a GIF or MP4 of it.

    python play.py simple_tag-medium-replay                             # in a window
    python play.py runs/NAME --seed-index 2 --shift speed --output chase.gif

A second shows ten steps, or twenty where an episode has 100 steps or more.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

import common
from utils.evaluation import save_video
from utils.frozen import policy_action
from utils.options import Count, Options, Seed, Shift
from utils.policies import TrainedPolicy
from utils.program import UserError, disk_errors, program


@dataclass
class Args(Options):
    policy: tyro.conf.Positional[str]  # name of a policy in pretrained/policies, policy file or run folder
    output: str | None = None  # .gif or .mp4 file to write instead of opening a window
    episodes: Count = 1
    steps: Count = 1_000  # end episodes after so many steps
    shift: Shift = "none"  # shifted environment
    seed: Seed = 0  # of first states and actions
    seed_index: int = 0  # which of the policy's seeds acts


def play(policy: TrainedPolicy, args: Args):
    """Yield the episodes as images, uint8 [height, width, 3]; print each episode's return."""
    prey, generator = policy.prey and partial(policy_action, policy.prey), policy.generator.manual_seed(args.seed)
    env = common.make_env(common.task_name(policy.args), 1, args.shift, "cpu", args.seed, prey, "rgb_array")
    for episode in range(args.episodes):
        obs, total = env.reset(), 0.0  # [1, n, d]
        for step in range(min(args.steps, env.episode_steps)):
            if step % (1 if env.episode_steps < 100 else 2) == 0:
                yield env.render()
            actions = policy.algorithm.act(policy.learners, obs.transpose(0, 1), policy.args, generator)  # [n, 1, A]
            obs, rewards, terminated = env.step(actions.transpose(0, 1))
            total += rewards.mean().item()
            if terminated.all():
                break
        print(f"episode {episode + 1}: return {total:.1f}, {step + 1} steps")


def show(images) -> None:
    """Show images in a window until they end or it is closed."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":  # matplotlib's choice without a display or a toolkit
        raise UserError("no window can be opened (no display, or no toolkit such as tkinter); use --output NAME.gif")
    plt.rcParams["toolbar"] = "None"
    figure = plt.figure("DOM2", figsize=(5, 5))
    for image in images:
        figure.clear()
        figure.add_axes((0, 0, 1, 1)).imshow(image)
        plt.pause(0.1)
        if not plt.fignum_exists(figure.number):
            return


def main(args: Args) -> None:
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no such folder; make it first")
    images = play(TrainedPolicy(args.policy, args.seed_index), args)
    try:
        if not args.output:
            return show(images)
        with disk_errors(args.output, "free some space"):
            save_video(images, Path(args.output))
    except RuntimeError as error:  # of MuJoCo's renderer
        raise UserError(str(error)) from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    program(lambda: main(tyro.cli(Args, description=__doc__)))
