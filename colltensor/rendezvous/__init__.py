"""Rendezvous: how the ranks of a new group find each other and agree that they are one group.

open_directory(init_method, rank, world_size)  where rank 0 says how it is reached
meet(directory, ...)                           the meeting itself, over TCP with rank 0
meet_through(exchange, ...)                    the same where the ranks can exchange bytes already
report_refusal(directory, error, ...)          tell the others why this rank will not come

secret, users, messages <- server, directory <- joining <- hosting, files <- meeting <- exchange, methods
"""

from colltensor.rendezvous.directory import Directory, FixedDirectory
from colltensor.rendezvous.exchange import Introduction, meet_through
from colltensor.rendezvous.files import FileDirectory
from colltensor.rendezvous.init_method import open_directory
from colltensor.rendezvous.meeting import Meeting, meet, report_refusal

__all__ = [
    "Directory",
    "FileDirectory",
    "FixedDirectory",
    "Introduction",
    "Meeting",
    "meet",
    "meet_through",
    "open_directory",
    "report_refusal",
]
