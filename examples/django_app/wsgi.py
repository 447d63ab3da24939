"""The WSGI application: `gunicorn --chdir examples/django_app --workers 4 wsgi`.

The provider is registered here and not in `AppConfig.ready`, which runs for every `manage.py` command: `collectstatic`
in the build of an image has no settings of the provider and needs none. A command that evaluates the flag calls
`get_webhook` itself. With `gunicorn --preload` the workers inherit the value and follow the store from the fork on.
"""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application
from orders.flags import get_webhook

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
application = get_wsgi_application()
get_webhook()
