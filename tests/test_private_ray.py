"""A job's private Ray is nobody else's: what it starts listens on loopback alone."""

from __future__ import annotations

import ipaddress

import psutil


def test_a_private_ray_listens_on_loopback_alone(ray_local: None) -> None:
    listening = []
    for process in psutil.Process().children(recursive=True):
        try:
            listening += [(process.name(), found.laddr) for found in process.net_connections("inet") if found.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
    assert listening and all(ipaddress.ip_address(address.ip.removeprefix("::ffff:")).is_loopback for _, address in listening), listening
