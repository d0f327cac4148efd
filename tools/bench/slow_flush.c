/* Makes fsync and fdatasync take SLOW_FLUSH_MS milliseconds longer, in the process that preloads this.
   It declares the little that it calls by itself, so that a compiler is enough to build it. */
extern void *dlsym(void *handle, const char *name);
extern char *getenv(const char *name);
extern double atof(const char *text);
extern int usleep(unsigned microseconds);

#define NEXT ((void *)-1L) /* dlsym: the one that this library hides */

static int flush(const char *name, int fd)
{
    const char *ms = getenv("SLOW_FLUSH_MS");
    int (*hidden)(int) = (int (*)(int))dlsym(NEXT, name);
    if (ms)
        usleep((unsigned)(atof(ms) * 1000));
    return hidden(fd);
}

int fsync(int fd)
{
    return flush("fsync", fd);
}

int fdatasync(int fd)
{
    return flush("fdatasync", fd);
}
