"""Rendezvous: how the ranks of a new group find each other and agree that they are one group.

Introduction                     one rank's part of the protocol, whatever carries its bytes
meet_through(gather, part)       the meeting where the ranks can exchange bytes already
open_directory(init_method, ...) where rank 0 says how it is reached
meet(directory, part, deadline)  the meeting over TCP with rank 0
report_refusal(directory, part)  tell the others why this rank will not come

secret, users <- protocol <- server, stores <- tcp, init_method
"""

from colltensor.rendezvous.init_method import open_directory
from colltensor.rendezvous.protocol import Introduction, Meeting, meet_through
from colltensor.rendezvous.stores import Directory, FileDirectory, FixedDirectory
from colltensor.rendezvous.tcp import meet, report_refusal

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
