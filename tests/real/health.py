"""How soon Ray notices a host that is gone: 7 s with these, some 150 s of a stalled job with its own settings.

Of every process of the cluster, the driver included. They cost a ping a second and connection, and a host that does not
answer for 6 s is given up: more than that a busy host must not be frozen.
"""

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_keepalive_time_ms": "2000",
    "RAY_grpc_keepalive_timeout_ms": "3000",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
}
