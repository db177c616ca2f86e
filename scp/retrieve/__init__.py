"""C-MOVE and C-GET (PS3.4 C.4.2, C.4.3): what is asked for, where it lies, and how it goes out.

`identifier` says what is wanted, `locate` where it is, `read_ahead` brings the bytes, `transcode` changes what a
destination does not take, `outbound` sends, and `service` counts and answers.
"""
