"""Problems that ship with tasks, and the script of those that a script makes. README.md says where each comes from."""
