"""A Dockerfile whose image runs as any user, even without an entry in /etc/passwd."""

from __future__ import annotations

from ftexp.config.versions import package_versions
from ftexp.deploy.plan import MOUNT, USER_ID


def dockerfile() -> str:
    """Return the Dockerfile, to be built in a checkout of ftexp."""
    return f"""\
# docker build --tag ftexp:latest --file deploy/Dockerfile .
FROM python:3.12-slim
# tini ends what is left of a command's processes; KubeRay's probes call wget
RUN apt-get update && apt-get install --yes --no-install-recommends tini wget && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ftexp
COPY pyproject.toml README.md ./
COPY conf conf
COPY ftexp ftexp
# ray[default]: the dashboard, by which KubeRay submits jobs, and the export of metrics. Ray's processes share the .pyc
# (of a file that is for another version of Python there is none)
RUN pip install --no-cache-dir . 'ray[default]=={package_versions()["ray"]}' \\
    && (python -m compileall -q /usr/local/lib/python3.12 || true)
# the user has no entry in /etc/passwd, and may be any: what it writes belongs to group 0
RUN mkdir -p /home/ftexp {MOUNT} && chgrp 0 /home/ftexp {MOUNT} && chmod 2775 /home/ftexp {MOUNT}
ENV HOME=/home/ftexp PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/ftexp
USER {USER_ID}:0
ENTRYPOINT ["tini", "--", "ftexp"]
CMD ["--help"]
"""
