"""Services as a user, against any peer: echo, find, store, move, get (PS3.4 Annexes A, B and C)."""

from sphere.scp.client.query import echo, find
from sphere.scp.client.retrieve import Progress, get, move
from sphere.scp.client.store import StoreResult, store, store_instances

__all__ = ["Progress", "StoreResult", "echo", "find", "get", "move", "store", "store_instances"]
