"""The cluster that a command starts where there is none."""

import psutil
import ray


def test_nothing_listens_beyond_loopback(cluster):
    """Alone on a machine, no process of a run listens on an address that another machine could reach."""
    ray.get(ray.remote(lambda: None).remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [
        (each.name(), each_socket.laddr.ip)
        for each in family
        for each_socket in each.net_connections("inet")
        if each_socket.status == psutil.CONN_LISTEN
    ]

    assert {"gcs_server", "raylet"} <= {name for name, _ in sockets}
    assert {address.removeprefix("::ffff:") for _, address in sockets} == {"127.0.0.1"}
