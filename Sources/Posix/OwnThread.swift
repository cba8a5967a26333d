// SPDX-License-Identifier: Apache-2.0
/// Threads for what blocks. Dispatch and the tasks of Swift share one pool of threads on Linux, which gets a new one
/// only about once a second, and never more than some 250: what blocks there holds up every task of the program.
internal import CLinux
internal import Dispatch
import Glibc

public enum OwnThread {
    private final class Start {
        let body: @Sendable () -> Void
        init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }

    /// Runs `body` on a thread of its own, which takes no signals.
    public static func start(_ body: @escaping @Sendable () -> Void) {
        var attributes = pthread_attr_t()
        pthread_attr_init(&attributes)
        defer { pthread_attr_destroy(&attributes) }
        pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
        var all = sigset_t()
        var before = sigset_t()
        sigfillset(&all)
        // A new thread has the mask of the one that makes it.
        pthread_sigmask(SIG_SETMASK, &all, &before)
        defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
        var thread = pthread_t()
        let start = Unmanaged.passRetained(Start(body))
        let code = pthread_create(
            &thread, &attributes,
            { argument in
                if let argument { Unmanaged<Start>.fromOpaque(argument).takeRetainedValue().body() }
                return nil
            }, start.toOpaque())
        guard code != 0 else { return }
        // The process may have no more threads: late is better than never.
        start.release()
        DispatchQueue.global().async(execute: body)
    }
}
