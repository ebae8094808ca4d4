"""Algorithm 1 on disk: the opponent answers and scores, the policy is trained, and so on."""
