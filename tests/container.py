"""What the Dockerfile builds, where there is no container engine: `make test-container`.

Its lines are executed in an overlay over this system's files, which is thrown away: RUN, COPY, ENV, ARG and WORKDIR as
they stand, with a fresh virtual environment in the place of the base image's Python. Then a user that the system does
not know runs the health check, and has torch compile something. For root on Linux. Not covered: the base image itself,
a GPU, and what a container engine does. Words such as TORCH=2.13.0 change an ARG, as `--build-arg` does.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STRANGER = 12345
"""A user's number that no system knows."""
COMPILES = "import torch; assert torch.compile(lambda x: x.sin() + 1)(torch.zeros(9)).sum() == 9; print('compiled')"


def lines(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions and what they say, without comments, on one line each."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def build(root: Path, arguments: dict[str, str]) -> None:
    """Execute the Dockerfile's lines below a root, and its health check as a stranger.

    Raises:
        subprocess.CalledProcessError: if one of them fails.
    """
    python = Path(sys.base_prefix) / "bin" / "python3"
    for folder in python.parents:
        (root / folder.relative_to("/")).chmod(0o755)  # in the overlay: a home may be closed to others
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"/opt/image/bin:{environment['PATH']}"
    place, given, health = "/", {}, []

    def run(command: list[str], *prefix: str) -> None:
        print("+", shlex.join(command), flush=True)
        # The folder is left to `env`, because `chroot` starts in the root.
        whole = ["chroot", str(root), *prefix, "env", f"--chdir={place}", *command]
        subprocess.run(whole, env={**given, **environment}, check=True)

    run([str(python), "-m", "venv", "--clear", "/opt/image"])
    for word, rest in lines((ROOT / "Dockerfile").read_text()):
        if word == "ARG":
            name, _, value = rest.partition("=")
            given[name] = arguments.get(name, value)
        elif word == "RUN":
            run(["bash", "-c", rest])
        elif word == "WORKDIR":
            run(["mkdir", "-p", rest])
            place = rest
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                goal = target if (ROOT / source).is_dir() else f"{target}/{source}"
                run(["cp", "-r", str(ROOT / source), goal])
        elif word == "ENV":
            environment.update(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "HEALTHCHECK":
            health = json.loads(rest.partition("CMD ")[2])
        elif word not in ("FROM", "USER", "VOLUME", "ENTRYPOINT", "CMD"):
            raise SystemExit(f"{word}: this test does not know the instruction")
    stranger = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    run(health, *stranger)
    run(["python", "-c", COMPILES], *stranger)


def main() -> None:
    """In a mount namespace of its own, so that whatever is mounted ends with the process."""
    if os.geteuid() != 0:
        raise SystemExit("make test-container mounts an overlay: run it as root, on Linux")
    if folder := os.environ.pop("OVERLAY", ""):
        subprocess.run(["mount", "-t", "tmpfs", "overlay", folder], check=True)
        upper, work, root = (Path(folder) / name for name in ("upper", "work", "root"))
        for each in (upper, work, root):
            each.mkdir()
        layers = f"lowerdir=/,upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
        for name in ("proc", "dev", "sys"):
            subprocess.run(["mount", "--rbind", f"/{name}", str(root / name)], check=True)
        build(root, dict(word.split("=", 1) for word in sys.argv[1:]))
        print("the Dockerfile's lines work")
    else:
        folder = tempfile.mkdtemp()
        inside = ["unshare", "--mount", sys.executable, "-m", "tests.container", *sys.argv[1:]]
        done = subprocess.run(inside, cwd=ROOT, env={**os.environ, "OVERLAY": folder}, check=False)
        os.rmdir(folder)  # empty out here, whatever was mounted on it
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
