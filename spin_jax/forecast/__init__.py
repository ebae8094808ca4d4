"""What a run is expected to take: seconds, bytes on disk, memory of the hosts; and what it took."""
