"""What each token passes through: feed-forwards, routers, balancers, dispatchers."""
