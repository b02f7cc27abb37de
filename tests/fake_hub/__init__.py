"""A Hugging Face Hub on 127.0.0.1, standard library only, for the real huggingface_hub, transformers and datasets.

    with FakeHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home, token="hf_owner")})

It has repositories (private ones, too), commits of regular and LFS files, branches, tags, pull requests, and
downloads with ETags, ranges and a CDN of another origin. It has no Xet, no discussions and no dataset viewer.
Repositories lie in memory; commit hashes follow from the content alone.

What can go wrong is asked for with `hub.fault(...)` and `hub.overwrite(...)`.
"""

from .server import FakeHub

__all__ = ["FakeHub"]
