"""The command `pyralis`; one file per subcommand group."""
