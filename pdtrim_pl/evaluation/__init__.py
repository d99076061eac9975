"""What a plan and a policy gain and what they cost."""
