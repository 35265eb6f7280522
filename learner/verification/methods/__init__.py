"""Recorded cases of the methods' official code, one file per folder of recordings, called as the folder is."""
