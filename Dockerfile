# syntax=docker/dockerfile:1
# One broadcaster. Build: docker build -t lonelypss .   How to run it: deploy/README.md
FROM python:3.11-slim AS build

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/lonelypss \
    && /opt/lonelypss/bin/pip install --no-cache-dir --disable-pip-version-check \
        --only-binary=:all: --no-binary=lonelypsc \
        -c constraints.txt '.[standard,postgres,metrics,otlp]' \
    && /opt/lonelypss/bin/pip uninstall --yes --quiet pip setuptools

FROM python:3.11-slim

# a number, so that files on the host can be given to this user, and Kubernetes sees it is not root
RUN groupadd --gid 10001 lonelypss \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/lonelypss --create-home \
        --shell /usr/sbin/nologin lonelypss \
    && chmod 0700 /var/lib/lonelypss
COPY --from=build /opt/lonelypss /opt/lonelypss

# the listener is for the network of the container: publish its port on an internal address only
ENV PATH=/opt/lonelypss/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LONELYPSS_HOST=0.0.0.0 \
    LONELYPSS_PORT=3003

USER 10001:10001
# the SQLite database, used signatures, and large messages on their way
WORKDIR /var/lib/lonelypss
VOLUME /var/lib/lonelypss
EXPOSE 3003

# alive, not ready: a container is no better for a restart while its database is away
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['LONELYPSS_PORT'] + '/healthz', timeout=4)"]

# exec form: SIGTERM reaches lonelypss itself
ENTRYPOINT ["lonelypss"]
CMD ["serve"]
