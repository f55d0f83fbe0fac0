/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a program has stored through a mapping, on its way into the upper's file.
 *
 * A store into a mapping takes no set-ID bits and no capability away; write(2) does: capabilities
 * always, the bits if who calls it lacks CAP_FSETID, as an ordinary user's daemon does
 * (file_remove_privs in fs/inode.c). So where there are some, the bytes go through a mapping of
 * our own, which is the same to the file system. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/xattr.h>

#include "mapped.h"
#include "sys.h"
#include "util.h"

static bool has_privileges(int fd, const struct stat *st)
{
    return st->st_mode & (S_ISUID | S_ISGID) || fgetxattr(fd, "security.capability", NULL, 0) > 0;
}

size_t mapped_store(int fd, const char *buf, size_t size, off_t offset)
{
    off_t within = offset % sysconf(_SC_PAGESIZE);
    char path[PROC_BYTES];
    cleanup_fd int own = -1;
    struct iovec from, to;
    struct stat st;
    ssize_t n;
    char *map;

    if (fstat(fd, &st) < 0 || offset >= st.st_size || !has_privileges(fd, &st))
        return 0;
    if ((off_t)size > st.st_size - offset)
        size = (size_t)(st.st_size - offset);
    proc_path(path, fd, NULL);
    own = open(path, O_RDWR | O_CLOEXEC); /* theirs may be for writing alone */
    if (own < 0)
        return 0;
    map =
        mmap(NULL, size + (size_t)within, PROT_READ | PROT_WRITE, MAP_SHARED, own, offset - within);
    if (map == MAP_FAILED)
        return 0;
    /* Not by memcpy: a full disk, or a file that gets shorter meanwhile, would be SIGBUS. */
    from = (struct iovec){.iov_base = (char *)buf, .iov_len = size};
    to = (struct iovec){.iov_base = map + within, .iov_len = size};
    n = process_vm_writev(getpid(), &from, 1, &to, 1, 0);
    (void)munmap(map, size + (size_t)within);
    return n < 0 ? 0 : (size_t)n;
}
