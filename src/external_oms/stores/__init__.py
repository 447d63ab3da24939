"""Where generations, values, leases and history live; the store decides how far an invalidation reaches."""
