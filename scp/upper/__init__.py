"""The DICOM upper layer for receivers (PS3.8): it blocks on its socket, one thread an association.

`server` accepts, `association` lives one association from A-ASSOCIATE-RQ to its end and hands whole DIMSE messages to
services; below it `messages` puts fragments together, `connection` reads PDUs from a socket, `negotiation` answers
A-ASSOCIATE-RQ, `command` is the codec of command sets, `dataset` what waits for its last fragment.
"""
