"""The ``ray`` command for nodes of one machine that listen on loopback alone: ``python deploy/loopback_ray.py start``.

Ray turns 127.0.0.1 into the machine's network address and then listens on all interfaces, unless it believes that there
are no clusters on this platform; and then it refuses a second node. So what this starts believes the one, and the
command itself the other. Give every node --node-ip-address=127.0.0.1.
"""

import os

from ray._private import ray_constants, services
from ray.scripts.scripts import main

if __name__ == "__main__":
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    main()
