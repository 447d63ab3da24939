"""gunicorn for an application of your own that has the extension.

gunicorn --config examples/deploy/gunicorn.conf.py --chdir examples 'flask_app:create_app()'

Set EXTERNAL_OMS_STORE to sqlite:////path/state.db or redis://…, so that all workers share it.
"""

from __future__ import annotations

import multiprocessing

bind = "127.0.0.1:8000"
workers = 2 * multiprocessing.cpu_count() + 1
# A delivery waits for the config API, up to timeout_seconds; threads answer orders meanwhile.
worker_class = "gthread"
threads = 8
# The application is made once and forked: a worker starts with the value, and follows the store from the fork on.
preload_app = True
# gunicorn's heartbeat files in memory: on a disk that is slow they stall the workers.
worker_tmp_dir = "/dev/shm"
# A worker is killed that does not answer for so long: far more than timeout_seconds, 5 unless set.
timeout = 30
graceful_timeout = 30
# Longer than the idle time of the load balancer, so that the balancer closes first.
keepalive = 75
